"""spconv's own layers in a network, made ours."""

from __future__ import annotations

from collections.abc import Collection

from cumm import tensorview as tv
from spconv import pytorch as spconv
from torch import nn

from cpq_train.sparse.convolution import SparseConv3d, SparseInverseConv3d, SubMConv3d, as_krsc

OURS: dict[type[nn.Module], type[nn.Module]] = {
    spconv.SubMConv3d: SubMConv3d,
    spconv.SparseConv3d: SparseConv3d,
    spconv.SparseInverseConv3d: SparseInverseConv3d,
}
"""spconv's layer -> ours."""

HARMLESS = {"__init__", "__dict__", "__weakref__", "extra_repr", "reset_parameters"}
"""What a subclass may define and still compute what its base does."""


def adopt(network: nn.Module) -> list[str]:
    """Make spconv's convolutions in a network ours, in place: classes change, parameters and names stay.

    Outputs stay what they were, on every device and in every mode, but that autocast leaves them in float32,
    and that voxels behind a strided layer may come in another order (on the CPU in that of the grid).
    Layers that ours would compute otherwise stay as they are (`why_not_adopted`).

    Args:
        network: Any network, which may itself be such a layer. State dicts from before still fit it.

    Returns:
        Names of the layers that changed, in the order of the network.
    """
    found = {
        name: layer
        for name, layer in network.named_modules()
        if not _is_ours(layer) and not why_not_adopted(layer)
    }
    for weight in {layer.weight for layer in found.values() if layer.conv1x1}:
        weight.data = as_krsc(weight.data)
    for layer in found.values():
        layer.__class__ = next(ours for base, ours in OURS.items() if isinstance(layer, base))
    return list(found)


def why_not_adopted(layer: nn.Module) -> str:
    """Why `adopt` leaves a layer of spconv as it is; empty where it does not, and of a layer that is ours.

    Reads as the end of "conv1 (SparseConv3d) cannot be taken over: ...".
    """
    if _is_ours(layer):
        return ""
    if not isinstance(layer, tuple(OURS)):
        return f"{type(layer).__name__} is none of {', '.join(base.__name__ for base in OURS)}"
    own = own_code(layer, OURS)
    if own:
        return f"{type(layer).__name__} has code of its own ({', '.join(own)})"
    if "weight" not in layer._parameters:
        return "its weight is no parameter but computed from others"
    if layer.act_type != tv.gemm.Activation.None_:
        return f"it applies an activation itself ({layer.act_type})"
    if layer.fp32_accum is not None:
        return f"it says what sums of half-precision numbers are kept in (fp32_accum {layer.fp32_accum})"
    if layer.get_max_num_voxels() is not None:
        return "it records how many voxels it sees (record_voxel_count)"
    return ""


def _is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, tuple(OURS.values()))


def own_code(layer: nn.Module, known: Collection[type[nn.Module]]) -> list[str]:
    """Methods and properties that a layer, or its class, has beyond the known class that it extends."""
    base = next(cls for cls in type(layer).__mro__ if cls in known)
    classes = set(type(layer).__mro__) - set(base.__mro__)
    named = {name for cls in classes for name, value in vars(cls).items() if hasattr(value, "__get__")}
    replaced = {name for name in vars(layer) if hasattr(getattr(base, name, None), "__get__")}
    return sorted((named - HARMLESS) | replaced)
