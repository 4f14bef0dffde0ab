"""How the layers of a network are connected: facts that a checkpoint can hold; `trace` finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESIDUAL = ":residual"
"""In a group of consumers, `<name of a residual add>:residual` stands for the add's identity input."""

NEVER_CALLED = "never called on the example input"


@dataclass(frozen=True)
class Wiring:
    """What one run shows of a network.

    Attributes:
        one_tensor: Names of the layers that read one tensor, zeros around it aside (`RESIDUAL` marks the
            identity of an add), in the order of the network; for every tensor that several read.
        folds: Name of a BatchNorm -> the layer whose output it, and nothing else, reads.
        unfolded: Name of a BatchNorm that cannot be folded -> why.
        never_called: Names of the layers and normalisations without a call.
        reused: Layer (`RESIDUAL` as above) that reads several tensors as one input -> the largest magnitude
            of each.
    """

    one_tensor: tuple[tuple[str, ...], ...] = ()
    folds: Mapping[str, str] = field(default_factory=dict)
    unfolded: Mapping[str, str] = field(default_factory=dict)
    never_called: tuple[str, ...] = ()
    reused: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        groups = [list(group) for group in self.one_tensor]
        reused = {member: list(seen) for member, seen in self.reused.items()}
        maps = {"folds": dict(self.folds), "unfolded": dict(self.unfolded), "reused": reused}
        return {"one_tensor": groups, "never_called": list(self.never_called), **maps}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Wiring:
        """Build from what `to_dict` returned."""
        return cls(
            one_tensor=tuple(tuple(group) for group in content["one_tensor"]),
            folds=content["folds"],
            unfolded=content["unfolded"],
            never_called=tuple(content["never_called"]),
            reused={member: tuple(seen) for member, seen in content["reused"].items()},
        )


def arguments_of(example_input: Any) -> tuple[Any, ...]:
    """What a network is called with: a tuple is several arguments, anything else, named ones too, is one."""
    is_several = isinstance(example_input, tuple) and not hasattr(example_input, "_fields")
    return example_input if is_several else (example_input,)
