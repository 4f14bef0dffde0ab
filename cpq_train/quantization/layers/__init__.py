"""Quantized layers, trained in the arithmetic that is deployed.

A layer whose weight and input both have integer codes is an integer convolution times a scale per channel,
and is computed so:

    acc = conv(codes_x, codes_w);    y = acc * (step_x * step_w);    y = y + bias

or with the bias in the sum, or in half precision (`numerics/biases.py`).

`numerics/exact_sum.py` keeps every sum a whole number that is held exactly, so that the result does not
depend on the order of summation, the kernel or the device. A layer of which only the weight or only the input
is rounded, or whose numbers are no integers, is the float layer on rounded values.

Every class extends the float layer it replaces and takes over the float module in place (`quantize_layer`),
so names, parameters and shapes stay what they were. Gradients are those of pytorch-quantization's QuantConv
layers.
"""

from cpq_train.quantization.layers.convolution import QuantizedConvolution
from cpq_train.quantization.layers.dense import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose2d,
    QuantLinear,
)
from cpq_train.quantization.layers.kinds import (
    QUANTIZED,
    kind_of,
    quantize_layer,
    unquantize_layer,
    why_refused,
)
from cpq_train.quantization.layers.residual import QuantAdd
from cpq_train.quantization.layers.sparse import (
    QuantSparseConv3d,
    QuantSparseInverseConv3d,
    QuantSubMConv3d,
)

__all__ = [
    "QUANTIZED",
    "QuantAdd",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "QuantSparseConv3d",
    "QuantSparseInverseConv3d",
    "QuantSubMConv3d",
    "QuantizedConvolution",
    "kind_of",
    "quantize_layer",
    "unquantize_layer",
    "why_refused",
]
