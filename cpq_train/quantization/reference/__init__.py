"""Quantized layers in whole numbers: what an integer engine computes, in NumPy.

It shares no code with the layers that train and none of PyTorch, so that agreement with them proves
something. Each layer is

    codes = clamp(rint(x * (qmax / amax)));    sums in int64;    y = float32(sums) * (step_x * step_w) + bias

with float32 operations that round once each.
"""

from cpq_train.quantization.reference.codes import Range, encode
from cpq_train.quantization.reference.layers import (
    Convolution,
    LayerResult,
    add,
    dense_convolution,
    inverse_sparse_convolution,
    linear,
    sparse_convolution,
)
from cpq_train.quantization.reference.rulebook import Kernel, RowOf

__all__ = [
    "Convolution",
    "Kernel",
    "LayerResult",
    "Range",
    "RowOf",
    "add",
    "dense_convolution",
    "encode",
    "inverse_sparse_convolution",
    "linear",
    "sparse_convolution",
]
