"""What libspconv cannot say of a plan, layer by layer, and what is doubtful of what it can."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.libspconv.arithmetic import (
    LARGEST_CODE,
    SMALLEST_CODE,
    codes_of,
    half_weight,
    precisions,
    range_of,
    step_of,
)
from cpq_train.export.libspconv.dialect import FP16, INT8
from cpq_train.export.plan import Addition, Concatenation, Convolution, Float32, InputRange, Operation, Plan

ON_MAPS = "works on maps, and this target holds what works on voxels alone"

LARGEST_HALF = float(np.finfo(np.float16).max)

_BIAS_TYPES = {"float32": "fp32", "int32": "int32"}


def why_not(plan: Plan) -> dict[str, str]:
    """Name -> reason of every layer that no file of libspconv can hold.

    Args:
        plan: A sparse part that `in_half_precision` gave.
    """
    reasons = {
        operation.name: _why_not(plan, operation) or _why_not_read(plan, operation)
        for operation in plan.operations
    }
    return {name: reason for name, reason in reasons.items() if reason}


def remarks(plan: Plan) -> list[str]:
    """What is doubtful of a plan that can be written, a sentence each."""
    types = precisions(plan)
    layers = [operation for operation in plan.operations if isinstance(operation, Convolution)]
    doubtful = [layer.name for layer in layers if layer.input_range is None and types[layer.name] == INT8]
    if not doubtful:
        return []
    return [
        f"{', '.join(doubtful)}: in fp16, with int8 behind it. NVIDIA's exporter of CUDA-BEVFusion makes "
        "such a first layer, that of CUDA-CenterPoint none, and the open rewrite of the engine would round "
        "what it reads to int8. The form that is known to run leaves the block behind it in float too, as "
        "configs/schemes/libspconv.yaml does."
    ]


def _why_not(plan: Plan, operation: Operation) -> str:
    """Why no node can be of an operation."""
    match operation:
        case Concatenation() | Convolution(kind="Conv2d" | "ConvTranspose2d"):
            return ON_MAPS
        case Convolution(input_range=None):
            return _why_no_half(operation)
        case Convolution():
            return _why_no_codes(plan, operation)
        case Addition(ranges=(first, second)):
            return _why_no_range(first) or _why_no_range(second) or _why_no_sum(plan, operation)
    return ""


def _why_not_read(plan: Plan, operation: Operation) -> str:
    """Why the tensors that an operation reads cannot be what all their readers want."""
    for tensor in operation.sources:
        ranges = {chosen for _, source, chosen in plan.reads() if source == tensor}
        if len(ranges) > 1 and None in ranges:
            return (
                "what it reads is read as int8 by some layers and as fp16 by others, and is one of them: "
                "quantize all of these layers or none"
            )
        if len(ranges) > 1:
            return (
                "what it reads has two ranges, and the engine keeps one: set `share_residual: true`, and the "
                "same `input` for all that read it"
            )
    return ""


def _why_no_half(layer: Convolution) -> str:
    """Why a float convolution cannot be written."""
    if layer.weight.dtype != np.float16:
        return f"its weight is {layer.weight.dtype}: the engine's is fp16"
    if not np.isfinite(layer.weight).all():
        return f"its weight passes {LARGEST_HALF:g}, where fp16 ends: quantize it"
    return _why_no_bias(layer)


def _why_no_codes(plan: Plan, layer: Convolution) -> str:
    """Why an integer convolution cannot be written."""
    assert layer.input_range is not None
    assert layer.weight_step is not None
    if layer.source == plan.source:
        return "it reads the voxels, which enter in fp16: set `weight: off` and `input: off` for it"
    return (
        _why_no_range(layer.input_range)
        or _why_no_step(layer.weight_step)
        or _why_other_codes(layer.weight, layer.weight_step)
        or _why_no_bias(layer)
    )


def _why_no_range(chosen: InputRange) -> str:
    """Why the engine cannot round as a range says."""
    if not chosen.format.signed:
        return f"its input has unsigned codes, 0 to {chosen.largest}: set `signed: true` for it"
    if chosen.format.bits != 8:
        return f"its input has {chosen.format.bits} bits: set `bits: 8` for it"
    if (chosen.smallest, chosen.largest) != (SMALLEST_CODE, LARGEST_CODE):
        return f"its input leaves out code {SMALLEST_CODE}: set `narrow_range: false` for it"
    return ""


def _why_no_step(step: Float32) -> str:
    """Why the engine cannot have the steps of a weight."""
    if not (np.isfinite(step) & (step >= np.finfo(np.float32).tiny)).all():
        return f"a step of its weight is {step.min():g}, no normal fp32 number: leave it in float"
    lost = step_of(range_of(step)) != step
    if lost.any():
        return (
            f"{lost.sum()} of the {len(step)} steps of its weight are no fp32 range / {LARGEST_CODE}: set "
            "`bits: 8` for its weight"
        )
    return ""


def _why_other_codes(codes: NDArray[np.int8], step: Float32) -> str:
    """Why the engine would not find the codes of a weight."""
    weight = half_weight(codes, step)
    if not np.isfinite(weight).all():
        return f"its weight passes {LARGEST_HALF:g}, where fp16 ends: scale it down"
    num_other = int((codes_of(weight, step) != codes).sum())
    if num_other:
        return (
            f"{num_other} codes of its weight would be others, rounded to fp16 with steps down to "
            f"{step.min():g}: leave it in float"
        )
    return ""


def _why_no_bias(layer: Convolution) -> str:
    if layer.bias is None:
        return "it has no bias, and every layer of the engine has one: give it zeros"
    if layer.bias.dtype != np.float16:
        kind = _BIAS_TYPES[str(layer.bias.dtype)]
        return f"its bias is {kind}: set `bias: fp16` in the scheme, or --snap_biases"
    if not np.isfinite(layer.bias).all():
        return f"its bias passes {LARGEST_HALF:g}, where fp16 ends: scale it down"
    return ""


def _why_no_sum(plan: Plan, addition: Addition) -> str:
    """Why an add of codes cannot give what its readers want."""
    if precisions(plan)[addition.name] == FP16:
        return "it adds int8 and gives fp16, which the engine may not do: quantize what reads it"
    return ""
