"""The kinds of layer that can be quantized, and the change from float to quantized and back."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from cpq_train.quantization.layers.convolution import QuantizedConvolution
from cpq_train.quantization.layers.dense import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose2d,
    QuantLinear,
)
from cpq_train.quantization.layers.residual import QuantAdd
from cpq_train.quantization.layers.sparse import (
    QuantSparseConv3d,
    QuantSparseInverseConv3d,
    QuantSubMConv3d,
)
from cpq_train.quantization.scheme import LayerScheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseInverseConv3d, SubMConv3d, why_not_adopted
from cpq_train.sparse.adoption import OURS, own_code

QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    SubMConv3d: QuantSubMConv3d,
    SparseConv3d: QuantSparseConv3d,
    SparseInverseConv3d: QuantSparseInverseConv3d,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.Linear: QuantLinear,
    ResidualAdd: QuantAdd,
}
"""Float layer -> quantized layer."""

ADDED = (
    *("_input_quantizer", "_weight_quantizer", "_residual_quantizer"),
    *("why_simulated", "bias_kind", "widens_steps", "gradients", "float_class"),
)
"""What a quantized layer has beyond the float one."""


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a layer, float or quantized; None where it is none that can be quantized.

    spconv's own layers have the kind of those that `adopt` makes of them.
    """
    plain = _plain_class(layer) or next(
        (ours for base, ours in OURS.items() if isinstance(layer, base)), None
    )
    return None if plain is None else plain.__name__


def why_refused(layer: nn.Module) -> str:
    """Why a layer that has a kind cannot be quantized right; empty where it can.

    Reads on from "conv1 (Conv2d) cannot be quantized: ".
    """
    if _plain_class(layer) is None:  # one of spconv's own
        return why_not_adopted(layer)
    mode = getattr(layer, "padding_mode", "zeros")
    if mode != "zeros":
        return f"padding_mode {mode!r}; accepted: 'zeros'"
    if reasons := [why for name in ("weight", "bias") if (why := _why_unfit(layer, name))]:
        return reasons[0]
    if own := own_code(layer, (*QUANTIZED, *QUANTIZED.values())):
        return f"{type(layer).__name__} has code of its own ({', '.join(own)}), which would be lost"
    return ""


def _plain_class(layer: nn.Module) -> type[nn.Module] | None:
    return next((c for c in QUANTIZED if isinstance(layer, c)), None)


def _why_unfit(layer: nn.Module, name: str) -> str:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return ""
    if name not in layer._parameters:
        return f"its {name} is no parameter but computed from others (parametrized, normalised or pruned)"
    if nn.parameter.is_lazy(tensor):
        return f"its {name} has no shape before the first call"
    dtype = cast(Tensor, tensor).dtype
    return "" if dtype == torch.float32 else f"its {name} is {dtype}; accepted: torch.float32"


def quantize_layer(layer: nn.Module, scheme: LayerScheme) -> None:
    """Make a float layer a quantized one, in place: its class changes, its parameters stay.

    Args:
        layer: One that has a kind (`kind_of`) and is not refused (`why_refused`).
        scheme: What to quantize; at least one of weight and input.
    """
    quantized = cast(QuantizedConvolution, layer)
    quantized.float_class = type(layer)
    layer.__class__ = QUANTIZED[cast("type[nn.Module]", _plain_class(layer))]
    quantized.attach(scheme)
    quantized.train(quantized.training)


def unquantize_layer(layer: nn.Module) -> None:
    """Make a quantized layer the float one again, in place: its quantizers go, its parameters stay."""
    layer.__class__ = cast(QuantizedConvolution, layer).float_class
    for name in ADDED:
        if hasattr(layer, name):
            delattr(layer, name)
