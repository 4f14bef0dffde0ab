"""A plan as an ONNX file whose dense part runs in kernels from codes to codes, of 8 bits throughout.

QLinearConv adds the bias to its sum of 32 bits and rounds to the codes of the next layer in one step:

    code = clip(round_half_even((acc + bias) * (step_x * step_w / step_y)), 0, 255)

The factor is rounded once more than in training, so that a code beside a tie may be another one. The layers
that write the head's outputs are the exact ones of `writer.py`, and so is the sparse part.

A dense layer is such a kernel where its codes, and those of all that read it, fit: behind a ReLU, of at most
7 bits in (CPUs without VNNI add two products of u8 and s8 in 16 bits) and 8 out, with one range for all
readers. The others are exact ones.

What else is faster in onnxruntime, with the same numbers:

* a map that such layers read is scattered as bytes;
* an exact layer of few outputs, as a head has, is a ConvTranspose with its kernel turned around: that
  multiplies once for each output, where Conv fills a vector of 16 of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.dense_form import as_convolution
from cpq_train.export.graph import Graph
from cpq_train.export.plan import (
    Addition,
    Concatenation,
    Convolution,
    HeightMap,
    InputRange,
    Operation,
    Plan,
)
from cpq_train.export.portable.writer import Writer
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.reference.rulebook import Kernel

LARGEST_IN, LARGEST_OUT = 127, 255
"""Largest codes that such a kernel may read, and write."""

FEW_OUTPUTS = 8
"""Up to so many channels a turned kernel is faster: 0.2 of the time at 2, 0.65 at 8, all of it at 16."""


def as_said(plan: Plan) -> Plan:
    """The plan with unsigned codes wherever no number is negative: so a file of unsigned bytes has them."""
    return replace(plan, operations=tuple(_unsigned(plan, operation) for operation in plan.operations))


def _unsigned(plan: Plan, operation: Operation) -> Operation:
    if isinstance(operation, Convolution) and operation.input_range is not None:
        return replace(operation, input_range=_unsigned_range(plan, operation.source, operation.input_range))
    if isinstance(operation, Addition) and operation.ranges is not None:
        first, second = (
            _unsigned_range(plan, *read) for read in zip(operation.sources, operation.ranges, strict=True)
        )
        return replace(operation, ranges=(first, second))
    return operation


def _unsigned_range(plan: Plan, tensor: str, chosen: InputRange) -> InputRange:
    if not plan.is_non_negative(tensor):
        return chosen
    return replace(chosen, format=IntegerFormat(chosen.largest.bit_length(), signed=False))


def why_not(plan: Plan) -> dict[str, str]:
    """Layer -> why the target does not take it."""
    reason = (
        "its bias is no whole multiple of its step: set bias: accumulator in the scheme, or --snap_biases"
    )
    dense = (o for o in plan.operations if isinstance(o, Convolution) and not o.is_sparse)
    return {o.name: reason for o in dense if o.bias is not None and o.bias.dtype != np.int32}


def fused_layers(plan: Plan) -> dict[str, InputRange]:
    """Dense layer that is one kernel from codes to codes -> the range of the codes that it writes."""
    found = {}
    for layer in plan.operations:
        if isinstance(layer, Convolution) and not layer.is_sparse and _reads_bytes(plan, layer):
            (chosen, *others) = _readings(plan, layer.name)
            if layer.relu and chosen is not None and not others and chosen.largest <= LARGEST_OUT:
                found[layer.name] = chosen
    return found


def _reads_bytes(plan: Plan, layer: Convolution) -> bool:
    chosen = layer.input_range
    return chosen is not None and chosen.largest <= LARGEST_IN and plan.is_non_negative(layer.source)


def _readings(plan: Plan, tensor: str) -> set[InputRange | None]:
    """The ranges that a tensor is read with, as part of a map too; None where as numbers."""
    found: set[InputRange | None] = {None} if tensor in plan.outputs.values() else set()
    for operation, source, chosen in plan.reads():
        if source == tensor:
            is_map = isinstance(operation, Concatenation | HeightMap)
            found |= _readings(plan, operation.name) if is_map else {chosen}
    return found


def maps_in_bytes(plan: Plan) -> dict[str, InputRange]:
    """Map of voxels that fused layers alone read -> the range of its codes."""
    fused, found = fused_layers(plan).keys(), {}
    for operation in plan.operations:
        if isinstance(operation, HeightMap):
            readers = {reader.name for reader, source, _ in plan.reads() if source == operation.name}
            (chosen, *others) = _readings(plan, operation.sources[0])
            if readers <= fused and chosen is not None and not others:
                found[operation.name] = chosen
    return found


def is_turned(layer: Convolution) -> bool:
    """Whether an exact layer is faster as the transposed convolution that it is."""
    kernel = layer.kernel
    return (
        layer.kind == "Conv2d"
        and len(layer.weight) <= FEW_OUTPUTS
        and set(kernel.stride) == {1}
        and min(turned(kernel).padding) >= 0
    )


def turned(kernel: Kernel) -> Kernel:
    """A kernel of stride 1 turned around: of a convolution for a transposed one, or back."""
    sides = zip(kernel.size, kernel.padding, kernel.dilation, strict=True)
    return replace(kernel, padding=tuple(d * (k - 1) - p for k, p, d in sides))


def turned_weight(weight: NDArray[Any]) -> NDArray[Any]:
    """The weight that belongs to a turned kernel."""
    return weight.swapaxes(0, 1)[..., ::-1, ::-1]


def in_bytes(codes: str) -> str:
    """Name of the bytes of codes."""
    return f"{codes}.uint8"


def fast_graph(plan: Plan) -> Graph:
    """The graph of a plan `as_said`; its inputs and outputs are those of the exact one."""
    return _FastWriter(plan).write()


class _FastWriter(Writer):
    """A fused layer has no tensor of numbers, but codes as bytes."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.fused, self.maps = fused_layers(plan), maps_in_bytes(plan)

    def _dense(self, layer: Convolution) -> None:
        if layer.name not in self.fused:
            super()._dense(layer)
            return
        assert layer.input_range is not None
        assert layer.weight_step is not None
        graph, name, written = self.graph, layer.name, self.fused[layer.name]
        self._name(name, written)
        weight, attributes, repeats = as_convolution(layer)
        zeros = [graph.integer(0, dtype) for dtype in (np.uint8, np.int8)]
        x = [
            self._byte_codes(layer.source, layer.input_range),
            self._step(layer.source, layer.input_range),
            zeros[0],
        ]
        steps = graph.initializer(f"{name}.weight_step", layer.weight_step.repeat(repeats))
        w = [graph.initializer(f"{name}.weight_codes", weight), steps, zeros[1]]
        y = [self._step(name, written), zeros[0]]
        codes = graph.node(
            "QLinearConv", [*x, *w, *y, *self._bias_codes(layer, (-1,), repeats)], name, **attributes
        )
        self._finish(layer, codes, repeats)

    def _finish(self, layer: Convolution, codes: str, repeats: int) -> None:
        """The byte codes of a fused layer: within its range, and upsampled where it is transposed."""
        graph, name, written = self.graph, layer.name, self.fused[layer.name]
        wanted = in_bytes(self._name(name, written))
        limits = [graph.integer(code, np.uint8) for code in (0, written.largest)]
        clipped = graph.node("Clip", [codes, *limits], wanted if repeats == 1 else f"{name}.clipped")
        if repeats == 1:
            return
        channels, height, width = self.shapes[name]
        size = layer.kernel.size[0]
        rows, columns = height // size, width // size
        # DepthToSpace one axis at a time: onnxruntime moves one quickly, two at once in ten times as long,
        # and has DepthToSpace itself for bytes in new releases only.
        shape = graph.ints(channels * size, size, rows, columns)
        split = graph.node("Reshape", [clipped, shape], f"{name}.split")
        wide = graph.node("Transpose", [split], f"{name}.wide", perm=[0, 2, 3, 1])
        shape = graph.ints(channels, size, rows, width)
        wide = graph.node("Reshape", [wide, shape], f"{name}.wide_rows")
        high = graph.node("Transpose", [wide], f"{name}.high", perm=[0, 2, 1, 3])
        graph.node("Reshape", [high, graph.ints(1, channels, height, width)], wanted)

    def _operator(self, layer: Convolution) -> tuple[str, NDArray[Any], dict[str, Any]]:
        if not is_turned(layer):
            return super()._operator(layer)
        layer = replace(layer, weight=turned_weight(layer.weight), kernel=turned(layer.kernel))
        weight, attributes, _ = as_convolution(layer)
        return "ConvTranspose", weight, attributes

    def _height_map(self, operation: HeightMap) -> None:
        if operation.name not in self.maps:
            super()._height_map(operation)
            return
        chosen, (source,) = self.maps[operation.name], operation.sources
        rows = self._byte_codes(source, chosen)
        self._scatter(operation, rows, np.uint8(0), in_bytes(self._name(operation.name, chosen)))

    def _step(self, tensor: str, chosen: InputRange) -> str:
        if tensor in self.maps:  # a map has the codes of its voxels
            (tensor,) = self.plan[tensor].sources
        return super()._step(tensor, chosen)

    def _concatenation(self, operation: Concatenation) -> None:
        if not self.fused.keys() & set(operation.sources):
            super()._concatenation(operation)

    def _codes(self, tensor: str, chosen: InputRange) -> str:
        name = self._name(tensor, chosen)
        if name not in self.graph and self._is_in_bytes(tensor):
            self.graph.cast(self._byte_codes(tensor, chosen), np.float32, name)
        return super()._codes(tensor, chosen)

    def _byte_codes(self, tensor: str, chosen: InputRange) -> str:
        """The codes of a tensor as bytes, made once for all readers."""
        graph, name = self.graph, in_bytes(self._name(tensor, chosen))
        if name in graph:
            return name
        if self._is_in_bytes(tensor):  # a fused layer has made its own by now: this joins them
            parts = [self._byte_codes(source, chosen) for source in self.plan[tensor].sources]
            return graph.node("Concat", parts, name, axis=1)
        return graph.cast(self._codes(tensor, chosen), np.uint8, name)

    def _is_in_bytes(self, tensor: str) -> bool:
        """Whether a tensor exists as codes alone: a fused layer makes it, or parts of it."""
        if tensor == self.plan.source:
            return False
        made_by = self.plan[tensor]
        parts = made_by.sources if isinstance(made_by, Concatenation) else (tensor,)
        return bool(self.fused.keys() & set(parts))

    def _name(self, tensor: str, chosen: InputRange) -> str:
        """Of codes; those of a part of a concatenation have no reader of their own in the plan."""
        return self.code_names.setdefault((tensor, chosen), f"{tensor}.codes")
