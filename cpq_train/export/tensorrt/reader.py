"""From a TensorRT file to the plan that it holds: read from its nodes, numbers and note.

The nodes of a layer follow one another: a Conv makes a layer, and a Relu or DepthToSpace behind it completes
it. What the writer would not make of the plan that was found is refused in the end, node by node.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.dense_form import as_transposed
from cpq_train.export.parts import MAP
from cpq_train.export.plan import Concatenation, Convolution, Float32, InputRange, Plan
from cpq_train.export.reading import attributes_of, check_form, first_line, open_model
from cpq_train.export.tensorrt.notes import KEY, read_note
from cpq_train.export.tensorrt.writer import model_of
from cpq_train.quantization.reference.rulebook import Kernel

ONE = Kernel((1, 1), (1, 1), (0, 0), (1, 1))
"""Geometry of the Conv of a transposed convolution."""

_OF_ANOTHER_FORM = (
    *(ArithmeticError, AssertionError, AttributeError),
    *(LookupError, StopIteration, TypeError, ValueError),
)


def read_plan(file: Path) -> Plan:
    """The plan of a TensorRT file.

    Raises:
        UserError: It is no ONNX file, or not one that the writer of TensorRT files makes.
    """
    model, numbers = open_model(file)
    about = model.producer_version, model.doc_string
    with np.errstate(all="ignore"):  # numbers of a damaged file; they are compared in the end
        try:
            plan = _Reader(model, numbers).plan()
        except _OF_ANOTHER_FORM as error:
            raise UserError(
                f"{file}: not made as export does it for TensorRT ({first_line(error)})"
            ) from error
        check_form(model, plan, lambda plan: model_of(plan, *about), str(file))
    return plan


class _Reader:
    def __init__(self, model: Any, numbers: dict[str, NDArray[Any]]) -> None:
        self.graph, self.numbers = model.graph, numbers
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.notes = read_note(next(one.value for one in model.metadata_props if one.key == KEY))
        self.operations: dict[str, Convolution | Concatenation] = {}

    def plan(self) -> Plan:
        for node in self.graph.node:
            match node.op_type:
                case "Conv":
                    self.add(self.convolution(node))
                case "Relu":
                    self.add(replace(self.last(node), name=node.output[0], relu=True))
                case "DepthToSpace":
                    self.add(_upsampling(self.last(node), node))
                case "Concat":
                    self.add(Concatenation(node.output[0], tuple(node.input)))
        operations = tuple(map(self.with_bias, self.operations.values()))
        outputs = {output.name: self.makers[output.name].input[0] for output in self.graph.output}
        source = next(node.output[0] for node in self.graph.node if list(node.input) == [MAP])
        _, channels, *grid = (dim.dim_value for dim in self.graph.input[0].type.tensor_type.shape.dim)
        return Plan(channels, tuple(grid), operations, outputs, source)

    def add(self, operation: Convolution | Concatenation) -> None:
        self.operations[operation.name] = operation

    def last(self, node: Any) -> Convolution:
        """The layer that a node completes."""
        return cast(Convolution, self.operations.pop(node.input[0]))

    def convolution(self, node: Any) -> Convolution:
        """What a Conv says; its bias is as it is in the file."""
        source, weight, *biases = node.input
        chosen, step = None, None
        if weight in self.makers:
            source, chosen = self.rounded(source)
            weight, step_name = self.makers[weight].input
            step = cast(Float32, self.numbers[step_name])
        bias = self.numbers[biases[0]] if biases else None
        return Convolution(
            node.output[0], "Conv2d", source, self.numbers[weight], step, bias, chosen, _kernel(node)
        )

    def rounded(self, values: str) -> tuple[str, InputRange]:
        """The tensor that was rounded to values, and how."""
        codes = self.makers[values].input[0]
        source = self.makers[codes].input[0]
        maker = self.makers[source]
        return maker.input[0] if maker.op_type == "Clip" else source, self.notes.ranges[codes]

    def with_bias(self, operation: Convolution | Concatenation) -> Convolution | Concatenation:
        """An operation with its bias as the plan holds it."""
        if isinstance(operation, Concatenation) or operation.bias is None:
            return operation
        noted = self.notes.biases[operation.name]
        if isinstance(noted, str):
            return replace(operation, bias=operation.bias.astype(noted))
        return replace(operation, bias=np.array(noted, np.int32).reshape(operation.bias.shape))


def _upsampling(layer: Convolution, node: Any) -> Convolution:
    """The transposed convolution that a 1x1 Conv and a DepthToSpace make."""
    size = attributes_of(node)["blocksize"]
    weight, kernel = as_transposed(layer.weight, size)
    step, bias = (
        None if values is None else np.ascontiguousarray(values[:: size**2])
        for values in (layer.weight_step, layer.bias)
    )
    return replace(
        layer,
        name=node.output[0],
        kind="ConvTranspose2d",
        weight=weight,
        weight_step=step,
        bias=bias,
        kernel=kernel,
    )


def _kernel(node: Any) -> Kernel:
    found = {name: tuple(values) for name, values in attributes_of(node).items()}
    if not found:
        return ONE
    return Kernel(found["kernel_shape"], found["strides"], found["pads"][:2], found["dilations"])
