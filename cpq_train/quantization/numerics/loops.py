"""Passes over flat arrays, each of which does what several of PyTorch's would, in the same arithmetic.

A ReLU, the codes of what it lets through and which gradients may come back are one pass here, six in
PyTorch; codes are bytes, a quarter of a number. Every number is computed by itself, in the order in which
PyTorch would (one rounding each, ties to even), so that the bits are the same.

Arrays have one axis, or rows and columns. That all of one loop are of one length is up to the caller.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import numpy as np

from cpq_train.common.compiled import compiled
from cpq_train.quantization.numerics.masks import INSIDE, POSITIVE


@compiled
def encode(x: Any, scale: Any, largest: Any, codes: Any) -> int:
    """u8 `codes` of fp32 `x`; not 0 if one of them is negative or no number."""
    num_unfit = 0
    for i in range(len(x)):
        code = np.rint(x[i] * scale)
        num_unfit |= 0 if code >= np.float32(0) else 1
        codes[i] = np.uint8(np.int32(code if code < largest else largest))
    return num_unfit


@compiled
def encode_relu(x: Any, scale: Any, largest: Any, amax: Any, y: Any, codes: Any, mask: Any) -> int:
    """`y = relu(x)`, its u8 `codes`, and the bits of `mask` if it has a length; not 0 if one is no number."""
    num_unfit = 0
    for i in range(len(x)):
        value = np.float32(0) if x[i] < np.float32(0) else x[i]
        code = np.rint(value * scale)
        num_unfit |= 0 if code >= np.float32(0) else 1
        codes[i] = np.uint8(np.int32(code if code < largest else largest))
        y[i] = value
    if len(mask):
        for i in range(len(x)):
            mask[i] = (POSITIVE if x[i] > np.float32(0) else np.uint8(0)) | (
                INSIDE if x[i] <= amax else np.uint8(0)
            )
    return num_unfit


@compiled
def pass_masked(grad: Any, mask: Any, bits: Any, out: Any) -> None:
    """`out = grad` where the mask has all of the bits, 0 elsewhere."""
    for i in range(len(grad)):
        out[i] = grad[i] if mask[i] & bits == bits else np.float32(0)


@compiled
def add_rounded(
    a: Any, scale_a: Any, step_a: Any, smallest: Any, largest: Any, amax: Any,
    codes_b: Any, step_b: Any, y: Any, mask: Any,
) -> None:  # fmt: skip
    """`y = code(a) * step_a + codes_b * step_b`, and in `mask`, if it has a length, whether |a| <= amax."""
    for i in range(len(a)):
        code = np.rint(a[i] * scale_a)
        code = smallest if code < smallest else code
        code = largest if code > largest else code
        y[i] = code * step_a + np.float32(codes_b[i]) * step_b
    if len(mask):
        for i in range(len(a)):
            mask[i] = INSIDE if np.abs(a[i]) <= amax else np.uint8(0)


@compiled
def scale_rows(sums: Any, unit: Any, bias: Any) -> None:
    """`sums * unit + bias` by column, in place, in two roundings; without a bias where that has no length."""
    if len(bias):
        for row in range(len(sums)):
            for column in range(sums.shape[1]):
                sums[row, column] = sums[row, column] * unit[column] + bias[column]
    else:
        for row in range(len(sums)):
            for column in range(sums.shape[1]):
                sums[row, column] = sums[row, column] * unit[column]


@compiled
def round_sums(sums: Any, bias_codes: Any, out: Any) -> None:
    """int32 sums and their bias codes by column, rounded to fp32 once; without codes where there are none."""
    if len(bias_codes):
        for row in range(len(sums)):
            for column in range(sums.shape[1]):
                out[row, column] = np.float32(np.int64(sums[row, column]) + bias_codes[column])
    else:
        for row in range(len(sums)):
            for column in range(sums.shape[1]):
                out[row, column] = np.float32(sums[row, column])


@compiled
def round_rows(
    flat: Any, starts: Any, scale: Any, step: Any, smallest: Any, largest: Any, codes: Any, values: Any
) -> None:
    """`codes` of the rows from `starts[i]` to `starts[i + 1]`, and their `values` if these have a length."""
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            code = np.rint(flat[i] * scale[row])
            code = smallest[row] if code < smallest[row] else code
            codes[i] = largest[row] if code > largest[row] else code
        if len(values):
            for i in range(starts[row], starts[row + 1]):
                values[i] = codes[i] * step[row]


@compiled
def pass_rows(grad: Any, flat: Any, starts: Any, factor: Any, amax: Any, out: Any) -> None:
    """`out = grad * factor` where |x| <= amax, 0 elsewhere, by rows."""
    for row in range(len(starts) - 1):
        for i in range(starts[row], starts[row + 1]):
            out[i] = np.float32(0) if np.abs(flat[i]) > amax[row] else grad[i] * factor[row]
