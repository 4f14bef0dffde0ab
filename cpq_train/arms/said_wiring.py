"""How a checkpoint has the layers of its network connected, compared with the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.arms.description import Description
from cpq_train.arms.state import differences
from cpq_train.common.errors import UserError, shown
from cpq_train.quantization.layers.kinds import kind_of, why_refused
from cpq_train.quantization.prepare import quantizable_layers
from cpq_train.quantization.scheme import OUTPUT_CHANNEL_AXIS
from cpq_train.quantization.wiring import RESIDUAL, Wiring


def wiring_said_by(
    said: Description, network: nn.Module, path: str | Path, what: str = "model.network"
) -> Wiring:
    """How a checkpoint has the layers of its network connected.

    Args:
        said: What the checkpoint says.
        network: A float network.
        path: The checkpoint, for messages.
        what: What the network is called in messages.

    Raises:
        UserError: The network has other layers, or they cannot be connected so.
    """
    where, layers = f"checkpoint {str(path)!r}", quantizable_layers(network)
    if found := differences(layers, said.kinds, "of another kind", str):
        raise UserError(f"{where} is of another architecture than {what}: layers: {found}")
    wiring = said.wiring or _registered_wiring(network, said.groups_of_schema_1)
    for problem in chain(_wrong_groups(wiring, layers), _wrong_folds(wiring.folds, network)):
        raise UserError(f"{where}, quantization, wiring, {problem}")
    return wiring


def _wrong_groups(wiring: Wiring, layers: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with groups of layers that read one tensor."""
    seen: set[str] = set()
    for member in chain.from_iterable(wiring.one_tensor):
        kind = layers.get(member.removesuffix(RESIDUAL))
        if kind is None or (member.endswith(RESIDUAL) and kind != "ResidualAdd"):
            yield f"one_tensor: got {shown(member)}, accepted: layers, and NAME{RESIDUAL} of a ResidualAdd"
        if member in seen and member not in wiring.reused:
            yield f"one_tensor: {shown(member)} is there twice; accepted: layers of reused"
        seen.add(member)


def _wrong_folds(folds: Mapping[str, str], network: nn.Module) -> Iterator[str]:
    """What is wrong with pairs of a BatchNorm and the layer that takes it up."""
    modules, layers = dict(network.named_modules(remove_duplicate=False)), list(folds.values())
    for norm, layer in folds.items():
        if why := _why_unfit(modules.get(norm), modules.get(layer)):
            yield f"folds: {shown(norm)} into {shown(layer)}: {why}"
        if layers.count(layer) > 1:
            yield f"folds: {shown(layer)} takes up several; accepted: one BatchNorm for each layer"


def _why_unfit(norm: nn.Module | None, layer: nn.Module | None) -> str:
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return f"got {_named(norm)}, accepted: a BatchNorm with running statistics"
    if layer is None or kind_of(layer) not in OUTPUT_CHANNEL_AXIS:
        return f"got {_named(layer)}, accepted: {', '.join(OUTPUT_CHANNEL_AXIS)}"
    num_channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if num_channels != norm.num_features:
        return f"got {norm.num_features} channels, accepted: {num_channels}, as the layer has"
    return why_refused(layer)


def _named(module: nn.Module | None) -> str:
    return "no module of that name" if module is None else type(module).__name__


def _registered_wiring(network: nn.Module, groups: Sequence[Sequence[str]]) -> Wiring:
    """How the layers of a file of schema 1 are connected, which does not say.

    Its releases folded a BatchNorm into the layer registered directly before it.

    Args:
        network: A float network.
        groups: Layers that share a quantizer in the file.
    """
    folds = {
        f"{parent_name}.{norm_name}".lstrip("."): f"{parent_name}.{name}".lstrip(".")
        for parent_name, parent in network.named_modules()
        for (name, layer), (norm_name, norm) in pairwise(parent.named_children())
        if kind_of(layer) is not None and isinstance(norm, _BatchNorm)
    }
    return Wiring(one_tensor=tuple(map(tuple, groups)), folds=folds)
