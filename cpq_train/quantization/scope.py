"""What quantizers remember while their network computes: it lives within one forward pass, or one block.

A range that is known need not be worked out for every layer that shares it, and a tensor that several layers
read need not be rounded for each. But nothing remembered may outlive a write to a weight or a range, and not
every write can be seen (`.data.copy_`, a kernel of one's own). So it is dropped behind each forward pass of
the network; inside `frozen`, where nothing may be written, ranges are kept from pass to pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from cpq_train.common.errors import UserError


class _Watched(NamedTuple):
    """A tensor that must not be written to: where it belongs, and how often it had been written to."""

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor
    version: int

    @property
    def is_written(self) -> bool:
        is_other = getattr(self.module, self.attribute) is not self.tensor
        return is_other or _version(self.tensor) != self.version


class Scope:
    """What the quantizers of one network remember; nothing while it is closed.

    Attributes:
        ranges: Quantizer -> its static range.
        codes: Shared quantizer -> the tensor that it rounded last, and its codes.
        collected: Shared quantizer -> the tensor that its calibrator took in last.
        is_in_forward: Whether a forward pass is under way; tensors are remembered only then.
        is_frozen: Whether ranges outlive a forward pass.
    """

    def __init__(self) -> None:
        self.ranges: dict[nn.Module, Any] = {}
        self.codes: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.collected: dict[nn.Module, Tensor] = {}
        self.is_frozen = False
        self.is_in_forward = False
        self._watched: list[_Watched] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a network remembers nothing."""
        return Scope, ()

    @property
    def is_open(self) -> bool:
        """Whether ranges are remembered."""
        return self.is_in_forward or self.is_frozen

    def begin_forward(self) -> None:
        """Open it for a forward pass.

        Raises:
            UserError: It is frozen, and a tensor was written to.
        """
        if written := [w.name for w in self._watched if w.is_written]:
            raise UserError(
                f"{len(written)} tensors were written to while their network is frozen, the first of them "
                f"{written[0]}; accepted: inside frozen(network) neither weights nor ranges change"
            )
        self.is_in_forward = True

    def end_forward(self) -> None:
        """Close it, and drop what does not outlive the pass."""
        self.is_in_forward = False
        self.codes.clear()
        self.collected.clear()
        if not self.is_frozen:
            self.ranges.clear()

    def freeze(self, tensors: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Keep ranges from pass to pass until `thaw`.

        Args:
            tensors: Name -> module and attribute of what must not be written to meanwhile.
        """
        found = ((name, *place, getattr(*place)) for name, place in tensors.items())
        self._watched = [
            _Watched(name, module, attribute, tensor, _version(tensor))
            for name, module, attribute, tensor in found
            if tensor is not None
        ]
        self.is_frozen = True

    def thaw(self) -> None:
        """Drop what was kept."""
        self.is_frozen, self._watched = False, []
        self.ranges.clear()


@contextmanager
def frozen_scope(scope: Scope, tensors: Mapping[str, tuple[nn.Module, str]]) -> Iterator[None]:
    """See `Scope.freeze`; a block inside another adds nothing."""
    if scope.is_frozen:
        yield
        return
    scope.freeze(tensors)
    try:
        yield
    finally:
        scope.thaw()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
