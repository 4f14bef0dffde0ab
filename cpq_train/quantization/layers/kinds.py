"""The kinds of layer that can be quantized, and the change from float to quantized and back."""

from __future__ import annotations

from typing import cast

from torch import nn

from cpq_train.quantization.layers.convolution import QuantizedConvolution
from cpq_train.quantization.layers.dense import QuantConv2d, QuantConvTranspose2d
from cpq_train.quantization.layers.residual import QuantAdd
from cpq_train.quantization.layers.sparse import QuantSparseConv3d, QuantSubMConv3d
from cpq_train.quantization.scheme import LayerScheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SubMConv3d

QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    SubMConv3d: QuantSubMConv3d,
    SparseConv3d: QuantSparseConv3d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    ResidualAdd: QuantAdd,
}
"""Float layer -> quantized layer."""

ADDED = (
    *("_input_quantizer", "_weight_quantizer", "_residual_quantizer"),
    *("why_simulated", "bias_kind", "widens_steps"),
)
"""What a quantized layer has beyond the float one."""


def kind_of(layer: nn.Module) -> str | None:
    """The kind of a float or quantized layer, None if it is none that is quantized."""
    kind = getattr(layer, "kind", None)
    return kind if kind is not None else type(layer).__name__ if type(layer) in QUANTIZED else None


def why_refused(layer: nn.Module) -> str:
    """Why a layer cannot be quantized; empty where it can."""
    return ""


def quantize_layer(layer: nn.Module, scheme: LayerScheme) -> None:
    """Make a float layer a quantized one, in place: its class changes, its parameters stay.

    Args:
        layer: One of the float types in `QUANTIZED`.
        scheme: What to quantize; at least one of weight and input.
    """
    layer.__class__ = QUANTIZED[type(layer)]
    cast(QuantizedConvolution, layer).attach(scheme)


def unquantize_layer(layer: nn.Module) -> None:
    """Make a quantized layer the float one again, in place: its quantizers go, its parameters stay."""
    float_types = {quantized: plain for plain, quantized in QUANTIZED.items()}
    layer.__class__ = float_types[type(layer)]
    for name in ADDED:
        if hasattr(layer, name):
            delattr(layer, name)
