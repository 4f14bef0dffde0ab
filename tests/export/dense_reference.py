"""A dense part as its plan says it, operation by operation, and plans of other biases and ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cpq_train.export.plan import Convolution, InputRange, Plan
from cpq_train.quantization.numerics.formats import IntegerFormat


def run_plan(plan: Plan, source: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of a dense part, by name, and the codes that its layers read, by name.

    Args:
        plan: Of a dense part.
        source: (1, C, H, W).
    """
    tensors, codes, names = {plan.source: source}, dict[str, Tensor](), plan.code_tensors()
    for operation in plan.operations:
        if not isinstance(operation, Convolution):
            tensors[operation.name] = torch.cat([tensors[name] for name in operation.sources], 1)
            continue
        x, chosen = tensors[operation.source], operation.input_range
        if chosen is not None:
            x = codes[names[operation.source, chosen]] = codes_of(x, chosen)
        tensors[operation.name] = run_layer(operation, x)
    return tensors, codes


def codes_of(x: Tensor, chosen: InputRange) -> Tensor:
    scale = torch.tensor(float(chosen.largest)) / torch.tensor(chosen.amax)
    return (x * scale).round().clamp(chosen.smallest, chosen.largest)


def run_layer(layer: Convolution, x: Tensor) -> Tensor:
    """Sums of codes are exact in fp64."""
    kind, kernel = torch.float32 if layer.input_range is None else torch.float64, layer.kernel
    convolve: Callable[..., Tensor] = functional.conv2d
    options = {"stride": kernel.stride, "padding": kernel.padding, "dilation": kernel.dilation}
    if layer.kind == "ConvTranspose2d":
        convolve = functional.conv_transpose2d
    y = convolve(x.to(kind), torch.from_numpy(layer.weight).to(kind), **options)
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    if bias is not None and bias.dtype == torch.int32:
        y = y + bias.to(kind).reshape(-1, 1, 1)
    if layer.input_range is not None:
        y = y.float() * torch.from_numpy(unit_of(layer)).reshape(-1, 1, 1)
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float().reshape(-1, 1, 1)
    return y.relu() if layer.relu else y


def unit_of(layer: Convolution) -> np.ndarray:
    """The value of 1 in the sum of a layer, (C',)."""
    assert layer.input_range is not None
    assert layer.weight_step is not None
    step = np.float32(layer.input_range.amax) / np.float32(layer.input_range.largest)
    return np.asarray(step * layer.weight_step)


def changed(plan: Plan, change: Callable[[Convolution], Convolution]) -> Plan:
    """A plan with another layer in place of each."""
    operations = (change(one) if isinstance(one, Convolution) else one for one in plan.operations)
    return replace(plan, operations=tuple(operations))


def on_the_grid(layer: Convolution) -> Convolution:
    """A layer whose bias is a whole number of units, where it has any."""
    if layer.bias is None or layer.input_range is None:
        return layer
    return replace(layer, bias=np.rint(layer.bias / unit_of(layer)).astype(np.int32))


def in_halves(layer: Convolution) -> Convolution:
    """A layer with an fp16 bias."""
    return layer if layer.bias is None else replace(layer, bias=layer.bias.astype(np.float16))


def reads_as(layer: Convolution, chosen: IntegerFormat) -> Convolution:
    """A layer whose input has other codes."""
    assert layer.input_range is not None
    return replace(layer, input_range=InputRange(layer.input_range.amax, chosen))
