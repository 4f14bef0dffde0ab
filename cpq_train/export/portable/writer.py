"""A plan as one ONNX file of standard operators, whose numbers are PyTorch's bit for bit in onnxruntime.

Everything between two float numbers is whole: codes enter, and a sum of products leaves as a whole number,
rounded to fp32 once. So the order of summation does not matter, and the fastest operator may be taken:

* sparse layers gather their neighbours by a table (`rulebooks.py`) and multiply with MatMulInteger;
* dense layers use Conv on whole numbers held in fp32, which are exact below 2^24. (In onnxruntime ConvInteger
  takes six times as long.) A transposed convolution whose kernel is its stride is a 1x1 convolution and
  DepthToSpace;
* where sums could pass a limit, or codes what 8-bit kernels add exactly, codes are split into digits.

Float layers are sums of fp32 products, whose order matters: they follow spconv's on the CPU, the centre cell
first, then cell by cell.

Letters: V voxels, K kernel cells, C C' input and output channels, H W rows and columns of a map.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.dense_form import as_convolution
from cpq_train.export.graph import Graph
from cpq_train.export.parts import shapes
from cpq_train.export.plan import (
    COORDS,
    FEATURES,
    Addition,
    Concatenation,
    Convolution,
    HeightMap,
    InputRange,
    Plan,
)
from cpq_train.export.portable.digits import BYTE_BITS, Digit, bits_of_exact_sums, put_together, split
from cpq_train.export.portable.rulebooks import Cells, Voxels, new_voxels, strided_outputs, table
from cpq_train.quantization.reference.rulebook import Kernel

Step: TypeAlias = tuple[str, list[str], str]
"""Operator, its further inputs, the end of its output's name."""


def portable_graph(plan: Plan) -> Graph:
    """The graph of a plan.

    Inputs are `voxel_features` (V, features) float32 and `voxel_coords` (V, 3) int32 z, y, x of one sample,
    each voxel once, V >= 0; outputs are those of the plan, (1, C, H, W) float32.
    """
    return Writer(plan).write()


def coords_name(plan: Plan, tensor: str) -> str:
    """The tensor (V, 3) int64 z, y, x of the voxels that features belong to."""
    return f"{_voxels_name(plan, tensor)}.coords"


def _voxels_name(plan: Plan, tensor: str) -> str:
    """The set of voxels of features: that of the file's input, or of the strided layer that made it."""
    if tensor == FEATURES:
        return "voxels"
    made_by = plan[tensor]
    is_strided = isinstance(made_by, Convolution) and made_by.kind == "SparseConv3d"
    return f"{tensor}.voxels" if is_strided else _voxels_name(plan, made_by.sources[0])


class Writer:
    """The graph of a plan in the making.

    Args:
        plan: A whole network.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.graph = plan, Graph()
        self.code_names = plan.code_tensors()
        self.voxels: dict[str, Voxels] = {}
        """Tensor of features -> its voxels."""
        self.shapes = shapes(plan)

    def write(self) -> Graph:
        """The whole graph."""
        graph, plan = self.graph, self.plan
        graph.input(FEATURES, np.float32, ["V", plan.num_features])
        coords = graph.input(COORDS, np.int32, ["V", 3])
        coords = graph.cast(coords, np.int64, coords_name(plan, FEATURES))
        depth, height, width = plan.grid
        self._add_voxels(FEATURES, coords, (depth, height, width))
        for operation in plan.operations:
            match operation:
                case Convolution() if operation.is_sparse:
                    self._sparse(operation)
                case Convolution():
                    self._dense(operation)
                case Addition():
                    self._addition(operation)
                case HeightMap():
                    self._height_map(operation)
                case Concatenation():
                    self._concatenation(operation)
        for name, tensor in plan.outputs.items():
            graph.output(name, tensor, [1, *self.shapes[tensor]])
        return graph

    # Codes

    def _codes(self, tensor: str, chosen: InputRange) -> str:
        """The codes of a tensor as whole numbers in fp32, made once for all readers."""
        graph, name = self.graph, self.code_names[tensor, chosen]
        if name not in graph:
            largest = graph.number(chosen.largest)
            amax = graph.initializer(f"{name}.amax", np.array(chosen.amax, np.float32))
            scale = graph.node("Div", [largest, amax], f"{name}.scale")
            self._step(tensor, chosen)
            scaled = graph.node("Mul", [tensor, scale], f"{name}.scaled")
            rounded = graph.node("Round", [scaled], f"{name}.rounded")
            graph.node("Clip", [rounded, graph.number(chosen.smallest), largest], name)
        return name

    def _step(self, tensor: str, chosen: InputRange) -> str:
        """The value of code 1."""
        graph, name = self.graph, f"{self.code_names[tensor, chosen]}.step"
        if name in graph:
            return name
        amax = graph.initializer(f"{self.code_names[tensor, chosen]}.amax", np.array(chosen.amax, np.float32))
        return graph.node("Div", [amax, graph.number(chosen.largest)], name)

    def _digits(self, tensor: str, chosen: InputRange, num_bits: int) -> list[Digit]:
        codes = self._codes(tensor, chosen)
        smallest = max(chosen.smallest, 0) if self._is_unsigned(tensor, chosen) else chosen.smallest
        return split(self.graph, codes, smallest, chosen.largest, num_bits)

    def _is_unsigned(self, tensor: str, chosen: InputRange) -> bool:
        return not chosen.format.signed or self.plan.is_non_negative(tensor)

    def _bytes(self, digit: Digit) -> str:
        dtype = np.int8 if digit.is_signed else np.uint8
        name = f"{digit.tensor}.{dtype.__name__}"
        return name if name in self.graph else self.graph.cast(digit.tensor, dtype, name)

    # Layers

    def _dense(self, layer: Convolution) -> None:
        """(1, C, H, W) -> (1, C', H', W')."""
        graph, name, kernel = self.graph, layer.name, layer.kernel
        assert layer.input_range is not None
        is_transposed = layer.kind == "ConvTranspose2d"
        weight, _, repeats = as_convolution(layer)
        is_signed = not self._is_unsigned(layer.source, layer.input_range)
        num_bits = bits_of_exact_sums(weight, output_axis=0, is_signed=is_signed)
        parts = self._digits(layer.source, layer.input_range, num_bits)
        operator, weight, attributes = self._operator(layer)
        codes = graph.initializer(f"{name}.weight_codes", weight)
        values = graph.cast(codes, np.float32, f"{name}.weight")
        sums = [
            graph.node(operator, [part.tensor, values], f"{name}.sum{number}", **attributes)
            for number, part in enumerate(parts)
        ]
        in_sum = self._bias_codes(layer, (-1, 1, 1), repeats)
        if len(sums) == 1:  # whole already: this keeps optimizers from folding the scale into the weights
            total = graph.node("Round", sums, f"{name}.sum")
            for bias in in_sum:
                whole = graph.cast(bias, np.float32, f"{bias}.whole")
                total = graph.node("Add", [total, whole], f"{name}.total")
        else:
            places = [part.place for part in parts] + [1] * len(in_sum)
            total = put_together(graph, [*sums, *in_sum], places, f"{name}.sum")
        if is_transposed:
            size = kernel.size[0]
            total = graph.node("DepthToSpace", [total], f"{name}.upsampled", blocksize=size, mode="CRD")
        self._rescale(layer, total, (-1, 1, 1))

    def _operator(self, layer: Convolution) -> tuple[str, NDArray[Any], dict[str, Any]]:
        """What sums up the products of a dense layer, with its weight and its attributes."""
        weight, attributes, _ = as_convolution(layer)
        return "Conv", weight, attributes

    def _sparse(self, layer: Convolution) -> None:
        """(V, C) -> (V', C')."""
        found = self._table(layer)
        if layer.input_range is None:
            self._sparse_float(layer, found)
        else:
            self._sparse_integer(layer, layer.input_range, found)

    def _table(self, layer: Convolution) -> str:
        """The table of a sparse layer; where it is strided, its output voxels too."""
        voxels = self.voxels[layer.source]
        if layer.kind == "SubMConv3d":
            self.voxels[layer.name] = voxels
            name = f"{voxels.name}.table{'x'.join(map(str, layer.kernel.size))}"
            if any(d != 1 for d in layer.kernel.dilation):
                name += f"d{'x'.join(map(str, layer.kernel.dilation))}"
            is_there = name in self.graph
            return name if is_there else table(self.graph, voxels, layer.kernel, voxels.coords, name)
        coords, grid = strided_outputs(self.graph, voxels, layer.kernel, _voxels_name(self.plan, layer.name))
        self._add_voxels(layer.name, coords, grid)
        return table(self.graph, voxels, layer.kernel, coords, f"{layer.name}.table")

    def _add_voxels(self, tensor: str, coords: str, grid: Cells) -> None:
        """The voxels of features, with a lookup for all that read them."""
        members, kernels = {tensor}, list[Kernel]()
        for operation in self.plan.operations:
            if not members & set(operation.sources):
                continue
            if isinstance(operation, Convolution) and operation.kind != "SubMConv3d":
                kernels.append(operation.kernel)
            elif not isinstance(operation, HeightMap):
                members.add(operation.name)
                kernels += [operation.kernel] if isinstance(operation, Convolution) else []
        self.voxels[tensor] = new_voxels(self.graph, _voxels_name(self.plan, tensor), coords, grid, kernels)

    def _sparse_integer(self, layer: Convolution, chosen: InputRange, found: str) -> None:
        graph, name = self.graph, layer.name
        num_out, *_, num_in = layer.weight.shape
        weight = graph.initializer(f"{name}.weight_codes", layer.weight.reshape(num_out, -1).T)
        row = graph.ints(0, layer.weight[0].size)
        sums, places, in_sum = [], [], self._bias_codes(layer, (-1,))
        for number, digit in enumerate(self._digits(layer.source, chosen, BYTE_BITS)):
            padded = self._padded(self._bytes(digit), num_in, np.int8 if digit.is_signed else np.uint8)
            met = graph.node("Gather", [padded, found], f"{name}.met{number}", axis=0)
            rows = graph.node("Reshape", [met, row], f"{name}.rows{number}")
            sums.append(graph.node("MatMulInteger", [rows, weight], f"{name}.sum{number}"))
            places.append(digit.place)
        if len(sums) == 1:
            total = graph.node("Add", [*sums, *in_sum], f"{name}.total") if in_sum else sums[0]
            total = graph.cast(total, np.float32, f"{name}.sum")
        else:
            total = put_together(graph, [*sums, *in_sum], places + [1] * len(in_sum), f"{name}.sum")
        self._rescale(layer, total, (-1,))

    def _sparse_float(self, layer: Convolution, found: str) -> None:
        """Sums in the order of spconv's Native algorithm; a cell without a voxel adds 0."""
        graph, name = self.graph, layer.name
        num_out, *_, num_in = layer.weight.shape
        cells = layer.weight.reshape(num_out, -1, num_in)
        padded = self._padded(layer.source, num_in, np.float32)
        total = ""
        for cell in _order_of_sum(layer):
            column = graph.node("Gather", [found, graph.integer(cell)], f"{name}.column{cell}", axis=1)
            rows = graph.node("Gather", [padded, column], f"{name}.rows{cell}", axis=0)
            weight = graph.initializer(f"{name}.weight{cell}", cells[:, cell].T)
            part = graph.node("MatMul", [rows, weight], f"{name}.part{cell}")
            total = graph.node("Add", [total, part], f"{name}.sum{cell}") if total else part
        self._end(layer, total, self._bias(layer, (-1,)))

    def _padded(self, tensor: str, num_channels: int, dtype: type[np.generic]) -> str:
        """Features with a row of zeros at the end, which row -1 of a table means."""
        name = f"{tensor}.padded"
        if name in self.graph:
            return name
        zeros = self.graph.initializer(
            f"zeros:{dtype.__name__}{num_channels}", np.zeros((1, num_channels), dtype)
        )
        return self.graph.node("Concat", [tensor, zeros], name, axis=0)

    def _rescale(self, layer: Convolution, sums: str, channel_shape: tuple[int, ...]) -> None:
        """Sums of products of codes to numbers."""
        graph, name = self.graph, layer.name
        assert layer.input_range is not None
        assert layer.weight_step is not None
        step = graph.initializer(f"{name}.weight_step", layer.weight_step.reshape(channel_shape))
        unit = graph.node("Mul", [self._step(layer.source, layer.input_range), step], f"{name}.unit")
        self._end(layer, sums, [("Mul", [unit], "product"), *self._bias(layer, channel_shape)])

    def _bias(self, layer: Convolution, channel_shape: tuple[int, ...]) -> list[Step]:
        """The step that adds a bias to scaled sums; none where there is no such bias."""
        if layer.bias is None or layer.bias.dtype == np.int32:
            return []
        bias = self.graph.initializer(f"{layer.name}.bias", layer.bias.reshape(channel_shape))
        if layer.bias.dtype == np.float16:
            bias = self.graph.cast(bias, np.float32, f"{bias}.value")
        return [("Add", [bias], "biased")]

    def _bias_codes(self, layer: Convolution, channel_shape: tuple[int, ...], repeats: int = 1) -> list[str]:
        """The bias that belongs to the sums; none where there is no such bias."""
        if layer.bias is None or layer.bias.dtype != np.int32:
            return []
        codes = layer.bias.repeat(repeats).reshape(channel_shape)
        return [self.graph.initializer(f"{layer.name}.bias_codes", codes)]

    def _addition(self, layer: Addition) -> None:
        graph, name = self.graph, layer.name
        branch, _ = layer.sources
        self.voxels[name] = self.voxels[branch]
        terms = list(layer.sources)
        if layer.ranges is not None:
            for row, read in enumerate(zip(layer.sources, layer.ranges, strict=True)):
                terms[row] = graph.node("Mul", [self._codes(*read), self._step(*read)], f"{name}.term{row}")
        self._end(layer, terms[0], [("Add", [terms[1]], "total")])

    def _end(self, operation: Convolution | Addition, tensor: str, steps: list[Step]) -> None:
        """The last steps of an operation, of which the very last one makes its tensor."""
        steps = [*steps, ("Relu", [], "relu")] if operation.relu else steps or [("Identity", [], "same")]
        for number, (operator, others, suffix) in enumerate(steps, start=1):
            name = operation.name if number == len(steps) else f"{operation.name}.{suffix}"
            tensor = self.graph.node(operator, [tensor, *others], name)

    # Maps

    def _height_map(self, operation: HeightMap) -> None:
        """(V, C) -> (1, C * D, H, W)."""
        self._scatter(operation, operation.sources[0], np.float32(0), operation.name)

    def _scatter(self, operation: HeightMap, rows: str, zero: np.generic, output: str) -> None:
        """The map of rows (V, C) of numbers or of codes."""
        graph, name, (source,) = self.graph, operation.name, operation.sources
        voxels, channels = self.voxels[source], self.shapes[source][0]
        empty = graph.filled(graph.ints(*voxels.grid, channels), zero, f"{name}.empty")
        volume = graph.node("ScatterND", [empty, voxels.coords, rows], f"{name}.volume")
        first = graph.node("Transpose", [volume], f"{name}.channels_first", perm=[3, 0, 1, 2])
        graph.node("Reshape", [first, graph.ints(1, *self.shapes[name])], output)

    def _concatenation(self, operation: Concatenation) -> None:
        self.graph.node("Concat", operation.sources, operation.name, axis=1)


def _order_of_sum(layer: Convolution) -> list[int]:
    """Kernel cells in the order in which spconv's Native algorithm adds them."""
    cells = list(range(math.prod(layer.kernel.size)))
    if layer.kind == "SubMConv3d":
        cells.insert(0, cells.pop(len(cells) // 2))
    return cells
