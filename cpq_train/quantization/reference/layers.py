"""Every kind of quantized layer on arrays.

Letters: B batch, V voxels, C channels, H W rows and columns of a map, K kernel offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpq_train.quantization.reference.codes import Coded, Float32, Range, encode, encode_bias
from cpq_train.quantization.reference.rulebook import (
    Coordinates,
    Kernel,
    Rules,
    grid,
    output_positions,
    rules,
)
from cpq_train.quantization.reference.sums import exact_sums

CHANNELS_AROUND = {
    "SubMConv3d": (0, 1, 2, 3, 4),
    "SparseConv3d": (0, 1, 2, 3, 4),
    "Conv2d": (0, 2, 3, 1),
    "ConvTranspose2d": (1, 2, 3, 0),
}
"""Order of a weight's axes that puts the output channels first and the input channels last."""


@dataclass(frozen=True)
class Convolution:
    """A quantized convolution.

    Args:
        kind: One of `CHANNELS_AROUND`, which says how the weight lies.
        weight: float32.
        bias: (C',) float32, or None.
        bias_kind: "float"; "accumulator", whole multiples of the value of one unit of a sum; or "fp16".
        weight_range: amax is one number, or one per output channel with the dimensions of the weight.
        input_range: amax is one number.
        kernel: Geometry; a submanifold layer's padding follows from its size.
        output_padding: Of ConvTranspose2d.
    """

    kind: str
    weight: Float32
    bias: Float32 | None
    weight_range: Range
    input_range: Range
    kernel: Kernel
    output_padding: tuple[int, ...] = (0, 0)
    bias_kind: str = "float"


class LayerResult(NamedTuple):
    """A layer's result and what led to it.

    Attributes:
        codes: Of the input (of both inputs of an add, one behind the other).
        weight_codes: In the layout of the weight; empty for an add.
        sums: int64, the shape of the output; with the bias where it is a whole number.
        unit: Value of one unit of a sum, broadcastable to the output.
        output: float32.
        positions: Of the output rows of a sparse layer, (V, 4) batch, z, y, x.
    """

    codes: NDArray[np.int32]
    weight_codes: NDArray[np.int32]
    sums: NDArray[np.int64]
    unit: Float32
    output: Float32
    positions: Coordinates | None = None


def dense_convolution(layer: Convolution, x: Float32) -> LayerResult:
    """Conv2d and ConvTranspose2d: (B, C, H, W) -> (B, C', H', W')."""
    batch_size, channels, *shape = x.shape
    coded = encode(x, layer.input_range)
    geometry = (layer.kind, layer.kernel, layer.output_padding)
    out_shape, found = _dense_rules(*geometry, batch_size, tuple(shape))
    rows = Coded(coded.codes.transpose(0, 2, 3, 1).reshape(-1, channels), coded.step)
    result = _of_rows(layer, rows, found, batch_size * int(np.prod(out_shape)))

    map_shape, channels_first = (batch_size, *out_shape, -1), (0, 3, 1, 2)
    return result._replace(
        codes=coded.codes,
        sums=result.sums.reshape(map_shape).transpose(channels_first),
        output=result.output.reshape(map_shape).transpose(channels_first),
        unit=result.unit.reshape(1, -1, 1, 1),
    )


@lru_cache(maxsize=1)  # most layers in a row have the geometry of the one before
def _dense_rules(
    kind: str, kernel: Kernel, output_padding: tuple[int, ...], batch_size: int, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Rules]:
    """Output shape and rules; a transposed convolution is a convolution read from its output to its input."""
    if kind == "Conv2d":
        out_shape = kernel.output_shape(shape)
        return out_shape, rules(grid(batch_size, shape), grid(batch_size, out_shape), out_shape, kernel)
    out_shape = kernel.transposed_shape(shape, output_padding)
    backwards = rules(grid(batch_size, out_shape), grid(batch_size, shape), shape, kernel)
    return out_shape, [(row_in, row_out) for row_out, row_in in backwards]


def sparse_convolution(
    layer: Convolution, features: Float32, positions: Coordinates, shape: Sequence[int]
) -> LayerResult:
    """SubMConv3d and SparseConv3d.

    Args:
        layer: The layer.
        features: (V, C).
        positions: (V, 4) batch, z, y, x.
        shape: Cells of the input grid along z, y, x.

    Returns:
        Features (V', C'); a submanifold layer keeps the rows, a strided one has its own order.
    """
    kernel, targets = layer.kernel, positions
    if layer.kind == "SubMConv3d":
        centred = tuple(d * (k // 2) for d, k in zip(kernel.dilation, kernel.size, strict=True))
        kernel = replace(kernel, stride=(1, 1, 1), padding=centred)
    else:
        shape = kernel.output_shape(shape)
        targets = output_positions(positions, shape, kernel)
    found = rules(positions, targets, shape, kernel)
    result = _of_rows(layer, encode(features, layer.input_range), found, len(targets))
    return result._replace(positions=targets)


def _of_rows(layer: Convolution, x: Coded, found: Rules, num_out: int) -> LayerResult:
    weight = encode(layer.weight, layer.weight_range)
    channels_last = weight.codes.transpose(CHANNELS_AROUND[layer.kind])
    num_channels, *_, num_inputs = channels_last.shape
    kernel = channels_last.reshape(num_channels, -1, num_inputs).transpose(1, 2, 0)
    sums = exact_sums(x.codes, kernel, found, num_out)
    unit = x.step * weight.step.reshape(-1)
    if layer.bias is not None and layer.bias_kind == "accumulator":
        sums = sums + encode_bias(layer.bias, unit)
    output = sums.astype(np.float32) * unit
    if layer.bias is not None and layer.bias_kind == "float":
        output = output + layer.bias
    if layer.bias is not None and layer.bias_kind == "fp16":
        output = output + layer.bias.astype(np.float16).astype(np.float32)
    return LayerResult(x.codes, weight.codes, sums, unit, output)


def add(branch: Float32, branch_range: Range, identity: Float32, identity_range: Range) -> LayerResult:
    """ResidualAdd: (V, C) + (V, C), each rounded to its own range."""
    a, b = encode(branch, branch_range), encode(identity, identity_range)
    output = a.codes.astype(np.float32) * a.step + b.codes.astype(np.float32) * b.step
    codes = np.stack([a.codes, b.codes])
    return LayerResult(
        codes, codes[:0], a.codes.astype(np.int64) + b.codes, np.maximum(a.step, b.step), output
    )
