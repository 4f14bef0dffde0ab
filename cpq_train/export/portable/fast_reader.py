"""From a file of `fast.py` to the plan that it holds; see `reader.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.plan import Concatenation, Convolution, HeightMap, InputRange, Operation, Plan
from cpq_train.export.portable.fast import fast_graph, turned, turned_weight
from cpq_train.export.portable.reader import Reader, format_of, read_with
from cpq_train.quantization.reference.rulebook import Kernel


def read_plan(file: Path) -> Plan:
    """The plan of a portable-fast file, with unsigned codes wherever no number is negative.

    Raises:
        UserError: It is no ONNX file, or not one that the writer of such files makes.
    """
    return read_with(_FastReader, fast_graph, file)


class _FastReader(Reader):
    def operation(self, tensor: str) -> Operation:
        return self.fused(tensor) if self.makes(tensor, "QLinearConv") else super().operation(tensor)

    def makes(self, tensor: str, operator: str) -> bool:
        node = self.makers.get(tensor)
        return node is not None and node.op_type == operator

    def fused(self, name: str) -> Convolution:
        """A layer from codes to codes."""
        node = self.maker(name)
        source, chosen = self.in_bytes(node.input[0])
        upsampling = 0 if node.attribute else 1  # a transposed layer is written without a geometry
        if self.makes(f"{name}.split", "Reshape"):
            upsampling = int(self.array(self.maker(f"{name}.split").input[1])[1])
        kind, weight, kernel = self.dense(node, self.array(node.input[3]), upsampling)
        repeats = max(upsampling, 1) ** 2
        bias = self.array(node.input[8])[::repeats].copy() if len(node.input) > 8 else None
        steps = self.array(node.input[4])[::repeats].copy()
        return Convolution(
            name, kind, source, np.ascontiguousarray(weight), steps, bias, chosen, kernel, relu=True
        )

    def dense(self, node: Any, weight: NDArray[Any], upsampling: int) -> tuple[str, NDArray[Any], Kernel]:
        if node.op_type == "ConvTranspose":
            return "Conv2d", turned_weight(weight), turned(self.kernel(node))
        return super().dense(node, weight, upsampling)

    def codes_above(self, tensor: str) -> str:
        node = self.maker(tensor)
        while node.op_type != "Clip" and not node.output[0].endswith(".codes"):
            node = self.maker(node.input[0])
        return str(node.output[0])

    def rounded(self, codes: str) -> tuple[str, InputRange]:
        node = self.maker(codes)
        return self.in_bytes(node.input[0]) if node.op_type == "Cast" else super().rounded(codes)

    def in_bytes(self, codes: str) -> tuple[str, InputRange]:
        """The tensor that byte codes stand for, and how."""
        node = self.maker(codes)
        if node.op_type == "Cast":
            return self.rounded(node.input[0])
        if node.op_type == "Concat":
            return self.joined(codes, node)
        kernel = self.up(codes, "QLinearConv", "ScatterND")
        if kernel.op_type == "ScatterND":
            return self.scattered(codes, kernel.input[2])
        step = self.maker(kernel.input[6], "Div")
        largest = int(self.array(step.input[1]).item())
        amax = float(self.array(step.input[0]).item())
        return self.read(kernel.output[0]), InputRange(amax, format_of(0, largest))

    def joined(self, codes: str, node: Any) -> tuple[str, InputRange]:
        """A concatenation of byte codes, whose parts have one range."""
        name = codes.rpartition(".codes")[0]
        parts = [self.in_bytes(part) for part in node.input]
        ranges = {chosen for _, chosen in parts}
        if len(ranges) != 1:
            raise UserError(f"{self.where}: {codes!r} joins codes of {len(ranges)} ranges")
        return self.made(codes, Concatenation(name, tuple(source for source, _ in parts))), ranges.pop()

    def scattered(self, codes: str, rows: str) -> tuple[str, InputRange]:
        """A map of the byte codes of voxels."""
        source, chosen = self.in_bytes(rows)
        return self.made(codes, HeightMap(codes.rpartition(".codes")[0], (source,))), chosen

    def made(self, codes: str, operation: Operation) -> str:
        """Take in an operation that makes codes alone."""
        if operation.name not in self.operations:
            self.operations[operation.name] = operation
            self.order[operation.name] = self.order[codes]
        return operation.name
