"""Every kind of quantized layer on arrays.

Letters: B batch, V voxels, C channels, D number of axes of space, K kernel offsets.
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
    "SparseInverseConv3d": (0, 1, 2, 3, 4),
    "Conv1d": (0, 2, 1),
    "Conv2d": (0, 2, 3, 1),
    "Conv3d": (0, 2, 3, 4, 1),
    "ConvTranspose2d": (1, 2, 3, 0),
    "Linear": (0, 1),
}
"""Order of a weight's axes that puts the output channels first and the input channels last."""

WITHOUT_SPACE = Kernel((), (), (), ())


@dataclass(frozen=True)
class Convolution:
    """A quantized convolution, or Linear, which is one without space.

    Args:
        kind: One of `CHANNELS_AROUND`, which says how the weight lies.
        weight: float32.
        bias: (C',) float32, or None.
        bias_kind: "float"; "accumulator", whole multiples of the value of one unit of a sum; or "fp16".
        weight_range: amax is one number, or one per output channel with the dimensions of the weight; of
            ConvTranspose2d one per output channel of a group.
        input_range: amax is one number.
        kernel: Geometry; a submanifold layer's padding follows from its size.
        output_padding: Of ConvTranspose2d.
        groups: In so many groups the channels are.
        more_behind: Zeros that each axis of a dense input has at its end beyond the kernel's padding.
    """

    kind: str
    weight: Float32
    bias: Float32 | None
    weight_range: Range
    input_range: Range
    kernel: Kernel = WITHOUT_SPACE
    output_padding: tuple[int, ...] = (0, 0)
    bias_kind: str = "float"
    groups: int = 1
    more_behind: tuple[int, ...] = ()


class LayerResult(NamedTuple):
    """A layer's result and what led to it.

    Attributes:
        codes: Of the input (of both inputs of an add, broadcast, one behind the other).
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
    """Conv1d, Conv2d, Conv3d and ConvTranspose2d: (B, C, ...) -> (B, C', ...), or both without B."""
    if x.ndim < layer.weight.ndim:
        one = dense_convolution(layer, x[None])
        return one._replace(codes=one.codes[0], sums=one.sums[0], output=one.output[0])
    coded = encode(x, layer.input_range)
    behind = [(0, 0), (0, 0), *((0, more) for more in layer.more_behind)]
    codes = np.pad(coded.codes, behind) if layer.more_behind else coded.codes
    batch_size, channels, *shape = codes.shape
    geometry = (layer.kind, layer.kernel, layer.output_padding)
    out_shape, found = _dense_rules(*geometry, batch_size, tuple(shape))
    rows = Coded(np.moveaxis(codes, 1, -1).reshape(-1, channels), coded.step)
    result = _of_rows(layer, rows, found, batch_size * int(np.prod(out_shape)))

    map_shape = (batch_size, *out_shape, result.output.shape[1])
    return result._replace(
        codes=coded.codes,
        sums=np.moveaxis(result.sums.reshape(map_shape), -1, 1),
        output=np.moveaxis(result.output.reshape(map_shape), -1, 1),
        unit=result.unit.reshape(-1, *[1] * len(shape)),
    )


def linear(layer: Convolution, x: Float32) -> LayerResult:
    """(..., C) -> (..., C')."""
    coded = encode(x, layer.input_range)
    rows = coded._replace(codes=coded.codes.reshape(-1, x.shape[-1]))
    every = np.arange(len(rows.codes))
    result = _of_rows(layer, rows, [(every, every)], len(every))
    shape = (*x.shape[:-1], result.output.shape[1])
    return result._replace(
        codes=coded.codes, sums=result.sums.reshape(shape), output=result.output.reshape(shape)
    )


@lru_cache(maxsize=1)  # most layers in a row have the geometry of the one before
def _dense_rules(
    kind: str, kernel: Kernel, output_padding: tuple[int, ...], batch_size: int, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Rules]:
    """Output shape and rules; a transposed convolution is a convolution read from its output to its input."""
    if kind != "ConvTranspose2d":
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


def inverse_sparse_convolution(
    layer: Convolution, features: Float32, positions: Coordinates, shape: Sequence[int], targets: Coordinates
) -> LayerResult:
    """SparseInverseConv3d: the convolution that it undoes, read from its outputs to its inputs.

    Args:
        layer: The layer, with the geometry of that convolution.
        features: (V, C).
        positions: (V, 4) batch, z, y, x; outputs of that convolution.
        shape: Cells of their grid.
        targets: (V', 4) inputs of that convolution.

    Returns:
        Features (V', C') in the order of the targets.
    """
    backwards = rules(targets, positions, shape, layer.kernel)
    found = [(row_in, row_out) for row_out, row_in in backwards]
    result = _of_rows(layer, encode(features, layer.input_range), found, len(targets))
    return result._replace(positions=targets)


def _of_rows(layer: Convolution, x: Coded, found: Rules, num_out: int) -> LayerResult:
    weight = encode(layer.weight, layer.weight_range)
    sums = _sums_of_groups(layer, x.codes, weight.codes, found, num_out)
    steps = weight.step.reshape(-1)
    if layer.kind == "ConvTranspose2d" and len(steps) > 1:
        steps = np.tile(steps, layer.groups)  # channel j of every group has the j-th
    unit = x.step * steps
    if layer.bias is not None and layer.bias_kind == "accumulator":
        sums = sums + encode_bias(layer.bias, unit)
    output = sums.astype(np.float32) * unit
    if layer.bias is not None and layer.bias_kind == "float":
        output = output + layer.bias
    if layer.bias is not None and layer.bias_kind == "fp16":
        output = output + layer.bias.astype(np.float16).astype(np.float32)
    return LayerResult(x.codes, weight.codes, sums, unit, output)


def _sums_of_groups(
    layer: Convolution, x_codes: NDArray[np.int32], w_codes: NDArray[np.int32], found: Rules, num_out: int
) -> NDArray[np.int64]:
    """Each group's sums of its own input channels, one group's channels behind the other's."""
    axis = -1 if layer.kind == "ConvTranspose2d" else 0  # axis 0 of the weight as it lies has the groups
    channels_last = w_codes.transpose(CHANNELS_AROUND[layer.kind])
    sums = []
    of_x, of_w = np.split(x_codes, layer.groups, 1), np.split(channels_last, layer.groups, axis)
    for x, w in zip(of_x, of_w, strict=True):
        kernel = w.reshape(w.shape[0], -1, w.shape[-1]).transpose(1, 2, 0)
        sums.append(exact_sums(x, kernel, found, num_out))
    return np.concatenate(sums, 1)


def add(branch: Float32, branch_range: Range, identity: Float32, identity_range: Range) -> LayerResult:
    """ResidualAdd: (V, C) + (V, C), or others that broadcast, each rounded to its own range."""
    a, b = encode(branch, branch_range), encode(identity, identity_range)
    output = a.codes.astype(np.float32) * a.step + b.codes.astype(np.float32) * b.step
    codes = np.stack(np.broadcast_arrays(a.codes, b.codes))
    return LayerResult(
        codes, codes[:0], a.codes.astype(np.int64) + b.codes, np.maximum(a.step, b.step), output
    )
