"""A float network that starts with parts of another one, which may have other classes; the rest is fresh."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cpq_train.arms.description import Description
from cpq_train.arms.state import check_part
from cpq_train.arms.structure import build
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import FLOAT_ARMS
from cpq_train.common.checkpoint import network_state, read_checkpoint
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.models import NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy

PRETRAINED = "pretrained"
"""The parent, among those of a checkpoint, that parts were taken from."""


@dataclass(frozen=True)
class PartialStart:
    """What came of it.

    Attributes:
        subject: The network, a float arm.
        taken: Name -> number of parameters of the largest modules that were taken whole.
        fresh: The same of those of which nothing was.
    """

    subject: Subject
    taken: Mapping[str, int]
    fresh: Mapping[str, int]

    def summary(self, path: str | Path) -> str:
        """Two lines for the console."""
        lines = {f"taken from {str(path)!r}": self.taken, "left fresh": self.fresh}
        return "\n".join(f"{what}: {_listed(modules)}" for what, modules in lines.items())


def _listed(modules: Mapping[str, int]) -> str:
    named = [f"{name} ({count:,} parameters)" for name, count in modules.items()]
    return ", ".join(named) or "nothing"


def start_with_parts(
    config: NetworkConfig,
    path: str | Path,
    parts: Sequence[str],
    batchnorm: BatchNormPolicy | None = None,
) -> PartialStart:
    """Build a float network that has some modules of a checkpoint.

    Args:
        config: Sizes of the network; those of the checkpoint need to agree in the parts only.
        path: A float checkpoint, or a float_tuned one whose BatchNorm is not folded.
        parts: Names of modules, such as "backbone_3d" and "dense_head.shared_conv".
        batchnorm: What becomes of BatchNorm; a float network has it trained.

    Raises:
        UserError: The checkpoint is unreadable or of another kind, a part is no module of the network, or its
            tensors have other names or shapes.
    """
    checkpoint = read_checkpoint(path)
    said = Description.of(checkpoint, path)
    said.check_centerpoint(path)
    _check_source(said, path)
    subject = build(config, "float", None, batchnorm)
    own = subject.network.state_dict()
    _check_parts(parts, own)
    mine, theirs = (
        {name: tensor for name, tensor in state.items() if _is_of(name, parts)}
        for state in (own, network_state(checkpoint))
    )
    check_part(mine, theirs, path)
    subject.network.load_state_dict(theirs, strict=False)
    subject.parents, subject.trained_on = {PRETRAINED: sha256_of(path)}, said.trained_on
    taken, fresh = (dict(_whole(subject.network, names)) for names in (mine, own.keys() - mine.keys()))
    return PartialStart(subject, taken, fresh)


def _check_source(said: Description, path: str | Path) -> None:
    if said.arm in FLOAT_ARMS and said.batchnorm != "folded":
        return
    raise UserError(
        f"model.weights {str(path)!r} is {said.arm!r}, its BatchNorm {said.batchnorm}; accepted with "
        "model.weights_parts: a float checkpoint, or a float_tuned one whose BatchNorm is not folded"
    )


def _check_parts(parts: Sequence[str], tensors: Collection[str]) -> None:
    modules = {name.rsplit(".", depth)[0] for name in tensors for depth in range(1, name.count(".") + 1)}
    if unknown := [part for part in parts if part not in modules] or ([] if parts else ["[]"]):
        whole = ", ".join(dict.fromkeys(name.split(".")[0] for name in tensors))
        raise UserError(
            f"model.weights_parts names {unknown[0]!r}, which is no module with weights; accepted: {whole}, "
            "and modules within them by their whole names, such as dense_head.shared_conv"
        )


def _is_of(name: str, parts: Sequence[str]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


def _whole(module: nn.Module, names: Collection[str], above: str = "") -> Iterator[tuple[str, int]]:
    """The largest modules of whose tensors all are among the names, with their numbers of parameters."""
    for child_name, child in module.named_children():
        name = f"{above}{child_name}"
        chosen = [f"{name}.{tensor}" in names for tensor in child.state_dict()]
        if chosen and all(chosen):
            yield name, sum(parameter.numel() for parameter in child.parameters())
        elif any(chosen):
            yield from _whole(child, names, f"{name}.")
