"""What the engine makes of a plan's numbers, and the plan as it can hold it.

The engine is given fp16 weights and their ranges, and quantizes them itself: code = clamp(round_half_even(w /
(range / 127)), -128, 127) in fp32. Whether that gives a plan's codes back is computed here.

Letters: C' output channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.libspconv.dialect import FP16, INT8
from cpq_train.export.plan import Convolution, Float32, Plan

LARGEST_CODE = 127
"""The code of a range, whatever it belongs to."""

SMALLEST_CODE = -128

Half = NDArray[np.float16]


def in_half_precision(plan: Plan) -> Plan:
    """A plan as libspconv can hold it: weights and biases of float layers in fp16, zeros for no bias."""
    operations = (
        _in_half_precision(operation) if isinstance(operation, Convolution) else operation
        for operation in plan.operations
    )
    return replace(plan, operations=tuple(operations))


def _in_half_precision(layer: Convolution) -> Convolution:
    bias = np.zeros(len(layer.weight), np.float16) if layer.bias is None else layer.bias
    if layer.weight_step is not None:
        return replace(layer, bias=bias)
    return replace(layer, weight=_half(layer.weight), bias=_half(bias))


def precisions(plan: Plan) -> dict[str, str]:
    """Tensor -> "int8" where it is read as codes, else "fp16", of every tensor of a plan."""
    found = dict.fromkeys([plan.source, *(operation.name for operation in plan.operations)], FP16)
    return found | {tensor: INT8 for _, tensor, chosen in plan.reads() if chosen is not None}


def half_weight(codes: NDArray[np.int8], step: Float32) -> Half:
    """The weight that is written for codes.

    Args:
        codes: (C', ...).
        step: (C',) value of one code.
    """
    return _half(codes.astype(np.float32) * _per_channel(step, codes.ndim))


def codes_of(weight: Half, step: Float32) -> NDArray[np.int8]:
    """The codes that the engine makes of a weight.

    Args:
        weight: (C', ...).
        step: (C',) value of one code.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.rint(weight.astype(np.float32) / _per_channel(step, weight.ndim))
    codes: NDArray[np.int8] = np.nan_to_num(rounded).clip(SMALLEST_CODE, LARGEST_CODE).astype(np.int8)
    return codes


def step_of(ranges: Float32) -> Float32:
    """The value of one code that the engine makes of a range."""
    return ranges / np.float32(LARGEST_CODE)


def range_of(step: Float32) -> Float32:
    """The range whose step is the given one, where there is one; the nearest, where there is none.

    A step of 8 bits is a range / 127 already. Of any others about one in 128 is none: there fp32 has fewer
    ranges than steps.
    """
    return step * np.float32(LARGEST_CODE)


def largest_weights(weight: Half) -> Float32:
    """(C',) largest magnitude of each output channel."""
    largest: Half = np.abs(weight.reshape(len(weight), -1)).max(1)
    return largest.astype(np.float32)


def _half(values: NDArray[Any]) -> Half:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which `why_not` finds
        return values.astype(np.float16)


def _per_channel(values: Float32, num_dims: int) -> Float32:
    return values.reshape(-1, *[1] * (num_dims - 1))
