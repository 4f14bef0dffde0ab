"""From a portable file to the plan that it holds: read from its nodes and numbers, not from what was meant.

Every operation is found by walking up from the outputs: what makes a tensor, what that reads, and so on. What
does not have a form that `writer.py` writes is refused with the name of its tensor; so is, in the end, each
node and number that the writer would not have made of the plan that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.dense_form import as_transposed
from cpq_train.export.graph import Graph
from cpq_train.export.plan import (
    FEATURES,
    Addition,
    Concatenation,
    Convolution,
    Float32,
    HeightMap,
    InputRange,
    Operation,
    Plan,
)
from cpq_train.export.portable.writer import portable_graph
from cpq_train.export.reading import attributes_of, check_form, open_model
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.reference.rulebook import Kernel

PRODUCTS = ("Conv", "ConvTranspose", "MatMulInteger")
"""What sums up products of codes; a ConvTranspose in files of `fast.py` alone."""


def read_plan(file: Path) -> Plan:
    """The plan of a portable file.

    Raises:
        UserError: It is no ONNX file, or not one that the writer of portable files makes.
    """
    return read_with(Reader, portable_graph, file)


def read_with(kind: type[Reader], graph_of: Callable[[Plan], Graph], file: Path) -> Plan:
    """The plan of a file.

    Args:
        kind: What reads its nodes and numbers.
        graph_of: What writes such files; the file has to be what it makes of the plan that was found.
        file: The file.

    Raises:
        UserError: See `read_plan`.
    """
    model, numbers = open_model(file)
    plan = kind(model.graph, numbers, str(file)).plan()
    about = model.graph.name, model.producer_version, model.doc_string
    check_form(model, plan, lambda plan: graph_of(plan).model(*about), str(file))
    return plan


class Reader:
    """The operations of a file, found from its outputs on upwards.

    Args:
        graph: Of the file.
        numbers: Of the file, by name.
        where: What to call it in messages.
    """

    def __init__(self, graph: Any, numbers: dict[str, NDArray[Any]], where: str) -> None:
        self.where, self.graph, self.numbers = where, graph, numbers
        self.makers = {name: node for node in graph.node for name in node.output}
        self.order = {name: number for number, name in enumerate(self.makers)}
        self.operations: dict[str, Operation] = {}
        self.grid = (0, 0, 0)

    def plan(self) -> Plan:
        """The whole plan."""
        outputs = {output.name: self.maker(output.name, "Identity").input[0] for output in self.graph.output}
        for tensor in outputs.values():
            self.read(tensor)
        in_order = sorted(self.operations.values(), key=lambda operation: self.order[operation.name])
        shapes = {one.name: one.type.tensor_type.shape for one in self.graph.input}
        if FEATURES not in shapes:
            raise UserError(f"{self.where}: no input {FEATURES!r}")
        num_features = shapes[FEATURES].dim[-1].dim_value if shapes[FEATURES].dim else 0
        return Plan(num_features, self.grid, tuple(in_order), outputs)

    # Nodes

    def maker(self, tensor: str, *operators: str) -> Any:
        """The node that makes a tensor, of one of some operators."""
        node = self.makers.get(tensor)
        if node is None or (operators and node.op_type not in operators):
            found = "nothing makes it" if node is None else f"{node.op_type} makes it"
            expected = f"; expected {' or '.join(operators)}" if operators else ""
            raise UserError(f"{self.where}: tensor {tensor!r}: {found}{expected}")
        return node

    def array(self, name: str) -> NDArray[Any]:
        """Numbers of the file."""
        if name not in self.numbers:
            raise UserError(f"{self.where}: no numbers of the name {name!r}")
        return self.numbers[name]

    def up(self, tensor: str, *operators: str) -> Any:
        """The nearest node of an operator above a tensor, along first inputs."""
        node = self.maker(tensor)
        while node.op_type not in operators:
            node = self.maker(node.input[0])
        return node

    # Operations

    def read(self, tensor: str) -> str:
        """Take in the operation that makes a tensor, and those above it."""
        if tensor == FEATURES or tensor in self.operations:
            return tensor
        try:
            self.operations[tensor] = self.operation(tensor)
        except UserError:
            raise
        except (ArithmeticError, LookupError, RecursionError, StopIteration, TypeError, ValueError) as error:
            raise UserError(f"{self.where}: tensor {tensor!r} is not made as export does it") from error
        return tensor

    def operation(self, tensor: str) -> Operation:
        """The operation that makes a tensor."""
        node = self.maker(tensor)
        if node.op_type == "Concat":
            return Concatenation(tensor, tuple(map(self.read, node.input)))
        if node.op_type == "Reshape":
            source = self.maker(self.maker(node.input[0], "Transpose").input[0], "ScatterND").input[2]
            return HeightMap(tensor, (self.read(source),))
        relu = node.op_type == "Relu"
        if relu:
            node = self.maker(node.input[0])
        if f"{tensor}.weight_codes" in self.numbers:
            return self.integer_convolution(tensor, node, relu)
        if f"{tensor}.weight0" in self.numbers:
            return self.float_convolution(tensor, node, relu)
        return self.addition(tensor, node, relu)

    def addition(self, name: str, node: Any, relu: bool) -> Addition:
        """The add of a residual block."""
        terms = [self.makers.get(one) for one in self.maker(node.output[0], "Add").input]
        if [term and term.output[0] for term in terms] != [f"{name}.term{row}" for row in range(2)]:
            branch, identity = map(self.read, node.input)
            return Addition(name, (branch, identity), None, relu)
        (a, range_a), (b, range_b) = (self.rounded(self.maker(one).input[0]) for one in node.input)
        return Addition(name, (a, b), (range_a, range_b), relu)

    def codes_above(self, tensor: str) -> str:
        """The codes that a tensor was made of."""
        return str(self.up(tensor, "Clip").output[0])

    def rounded(self, codes: str) -> tuple[str, InputRange]:
        """The tensor that codes were made of, and how."""
        clip = self.maker(codes, "Clip")
        scaled = self.maker(self.maker(clip.input[0], "Round").input[0], "Mul")
        scale = self.maker(scaled.input[1], "Div")
        smallest, largest = (int(self.array(name).item()) for name in clip.input[1:])
        amax = self.array(scale.input[1])
        if self.array(scale.input[0]).item() != largest or amax.dtype != np.float32:
            raise UserError(f"{self.where}: {codes!r} is scaled for another largest code than {largest}")
        return self.read(scaled.input[0]), InputRange(float(amax.item()), format_of(smallest, largest))

    def integer_convolution(self, name: str, node: Any, relu: bool) -> Convolution:
        """A layer of codes, whose last node but a ReLU is given."""
        product, bias = self.without_bias(node)
        sums, unit = self.maker(product, "Mul").input
        step, weight_step = self.maker(unit, "Mul").input
        up = self.up(sums, "DepthToSpace", *PRODUCTS)
        node = self.up(up.output[0], *PRODUCTS)
        weight = self.array(f"{name}.weight_codes")
        upsampling = attributes_of(up)["blocksize"] if up.op_type == "DepthToSpace" else 0
        if f"{name}.bias_codes" in self.numbers:
            bias = self.array(f"{name}.bias_codes").reshape(-1)[:: max(upsampling, 1) ** 2].copy()
        if node.op_type != "MatMulInteger":
            kind, weight, kernel = self.dense(node, weight, upsampling)
            codes = self.codes_above(node.input[0])
        else:
            met = self.maker(self.maker(node.input[0], "Reshape").input[0], "Gather")
            kind, kernel = self.sparse(met.input[1])
            weight = weight.T.reshape(weight.shape[1], *kernel.size, -1)
            codes = self.codes_above(met.input[0])
        source, chosen = self.rounded(codes)
        if step != f"{codes}.step":
            raise UserError(f"{self.where}: {name!r} has another step than its codes")
        weight = np.ascontiguousarray(weight)
        steps = cast(Float32, self.array(weight_step).reshape(-1))
        return Convolution(name, kind, source, weight, steps, bias, chosen, kernel, relu)

    def float_convolution(self, name: str, node: Any, relu: bool) -> Convolution:
        """A sparse layer of fp32 numbers."""
        total, bias = self.without_bias(node)
        rows = self.maker(self.up(total, "MatMul").input[0], "Gather")
        kind, kernel = self.sparse(self.maker(rows.input[1], "Gather").input[0])
        cells = [self.array(f"{name}.weight{cell}").T for cell in range(int(np.prod(kernel.size)))]
        weight = np.stack(cells, 1).reshape(len(cells[0]), *kernel.size, -1)
        source = self.read(self.maker(rows.input[0], "Concat").input[0])
        return Convolution(name, kind, source, weight, None, bias, None, kernel, relu)

    def without_bias(self, node: Any) -> tuple[str, NDArray[Any] | None]:
        """What a bias is added to, and the bias."""
        if node.op_type == "Add":
            bias = self.makers.get(node.input[1])
            name = bias.input[0] if bias is not None and bias.op_type == "Cast" else node.input[1]
            if name in self.numbers:
                return node.input[0], self.array(name).reshape(-1)
        return node.output[0], None

    def dense(self, node: Any, weight: NDArray[Any], upsampling: int) -> tuple[str, NDArray[Any], Kernel]:
        """Kind, weight as PyTorch has it, and geometry of a Conv; 0 where nothing behind it upsamples."""
        if upsampling:
            return "ConvTranspose2d", *as_transposed(weight, upsampling)
        return "Conv2d", weight, self.kernel(node)

    def kernel(self, node: Any) -> Kernel:
        """Geometry of a convolution."""
        kernel = _kernel_of(node)
        if kernel is None:
            raise UserError(f"{self.where}: {node.output[0]!r} is not padded alike on both sides")
        return kernel

    # Rulebooks

    def sparse(self, table: str) -> tuple[str, Kernel]:
        """Kind and geometry of a sparse layer, from its table."""
        gather = self.maker(table, "Gather")
        cells = self.maker(gather.input[1], "Add")
        first = self.maker(self.maker(cells.input[0], "Unsqueeze").input[0], "ReduceSum")
        corner = self.maker(self.maker(first.input[0], "Mul").input[0], "Add")
        strided = self.maker(corner.input[0], "Mul")
        coords, low, padded = self.lookup(gather.input[0])
        steps = np.unravel_index(self.array(cells.input[1])[0], padded)
        size = tuple(len(np.unique(axis)) for axis in steps)
        dilation = tuple(int(axis.max()) // max(n - 1, 1) or 1 for axis, n in zip(steps, size, strict=True))
        stride = tuple(map(int, self.array(strided.input[1])))
        padding = tuple(a - int(b) for a, b in zip(low, self.array(corner.input[1]), strict=True))
        kernel = Kernel(size, stride, padding, dilation)
        if strided.input[0] == coords:
            return "SubMConv3d", kernel
        self.check_outputs(strided.input[0], coords, kernel)
        return "SparseConv3d", kernel

    def lookup(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Coordinates of the voxels of a lookup, how far it is padded below, and its cells."""
        scatter = self.maker(name, "ScatterElements")
        parts = self.maker(self.maker(scatter.input[1], "ReduceSum").input[0], "Mul")
        moved = self.maker(parts.input[0], "Add")
        low = tuple(map(int, self.array(moved.input[1]).tolist()))
        plane, row, _ = map(int, self.array(parts.input[1]).tolist())
        num_cells = int(self.array(self.maker(scatter.input[0], "ConstantOfShape").input[0]).item())
        return moved.input[0], low, (num_cells // plane, plane // row, row)

    def check_outputs(self, outputs: str, coords: str, kernel: Kernel) -> None:
        """Whether a strided layer's output voxels are those that its kernel meets; learns the first grid."""
        pool = self.up(outputs, "MaxPool")
        volume = self.maker(pool.input[0], "Reshape")
        occupied = self.maker(volume.input[0], "ScatterElements")
        taken = self.maker(self.maker(occupied.input[1], "ReduceSum").input[0], "Mul").input[0]
        if _kernel_of(pool) != kernel or taken != coords:
            raise UserError(f"{self.where}: {pool.output[0]!r} finds other output voxels than its layer has")
        if self.maker(coords).op_type == "Cast":
            z, y, x = map(int, self.array(volume.input[1])[2:])
            self.grid = (z, y, x)


def _kernel_of(node: Any) -> Kernel | None:
    """Geometry of a Conv or MaxPool; None where it is not padded alike on both sides."""
    said = attributes_of(node)
    size, stride, pads, dilation = (
        tuple(said[name]) for name in ("kernel_shape", "strides", "pads", "dilations")
    )
    half = len(pads) // 2
    return Kernel(size, stride, pads[:half], dilation) if pads[:half] == pads[half:] else None


def format_of(smallest: int, largest: int) -> IntegerFormat:
    """The integers of a range of codes."""
    if smallest == 0:
        return IntegerFormat(largest.bit_length(), signed=False)
    return IntegerFormat(largest.bit_length() + 1, signed=True, narrow_range=smallest == -largest)
