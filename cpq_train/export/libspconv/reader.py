"""From a file of libspconv's dialect to the plan that it holds, node by node.

What this package does not write is refused, NVIDIA's own files too: their layers have no names to go by.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.libspconv.arithmetic import codes_of, step_of
from cpq_train.export.libspconv.dialect import INT8, check_model
from cpq_train.export.libspconv.writer import model_of
from cpq_train.export.plan import Addition, Convolution, HeightMap, InputRange, Operation, Plan
from cpq_train.export.reading import attributes_of, check_form, open_model
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.reference.rulebook import Kernel

CODES = IntegerFormat(8, signed=True)
"""The only ones of the engine."""


def read_plan(file: Path) -> Plan:
    """The plan of a file of libspconv.

    Raises:
        UserError: It is no ONNX file, or not one that the writer of this target makes.
    """
    model, numbers = open_model(file, lambda model: check_model(model, str(file)))
    plan = _plan(model.graph, numbers, str(file))
    about = model.producer_version, model.doc_string
    check_form(model, plan, lambda plan: model_of(plan, *about), str(file))
    return plan


def _plan(graph: Any, numbers: dict[str, NDArray[Any]], where: str) -> Plan:
    operations, outputs = list[Operation](), dict[str, str]()
    for node in graph.node:
        try:
            match node.op_type:
                case "SparseConvolution":
                    operations.append(_convolution(node, numbers))
                case "Add":
                    operations.append(_addition(node))
                case "Relu":
                    operations[-1] = _with_relu(operations[-1])
                case "ScatterDense":
                    operations.append(HeightMap(node.name, (node.input[0],)))
                case "Reshape":
                    outputs[node.output[0]] = node.input[0]
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{where}: node {node.name!r} is not made as export does it") from error
    first = next((node for node in graph.node if node.op_type == "SparseConvolution"), None)
    if first is None or len(graph.input) != 1:
        raise UserError(f"{where}: no sparse layer, or not one input")
    (source,) = graph.input
    dims = [0, *(one.dim_value for one in source.type.tensor_type.shape.dim)]
    grid = tuple(attributes_of(first)["input_spatial_shape"])
    return Plan(dims[-1], grid, tuple(operations), outputs, source.name)


def _convolution(node: Any, numbers: dict[str, NDArray[Any]]) -> Convolution:
    said = attributes_of(node)
    weight, bias = (numbers[name] for name in node.input[1:])
    step, chosen = None, None
    if said["precision"] == INT8:
        step = step_of(np.array(said["weight_dynamic_ranges"], np.float32))
        weight, chosen = codes_of(weight, step), InputRange(said["input_dynamic_range"], CODES)
    geometry = (tuple(said[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    return Convolution(
        node.name,
        "SubMConv3d" if said["subm"] else "SparseConv3d",
        node.input[0],
        weight,
        step,
        bias,
        chosen,
        Kernel(*geometry),
        relu=said["activation"] == "ReLU",
    )


def _addition(node: Any) -> Addition:
    said, ranges = attributes_of(node), None
    if said["precision"] == INT8:
        amax = [said[f"input{row}_dynamic_range"] for row in range(2)]
        ranges = InputRange(amax[0], CODES), InputRange(amax[1], CODES)
    return Addition(node.name, (node.input[0], node.input[1]), ranges)


def _with_relu(operation: Operation) -> Addition:
    if not isinstance(operation, Addition):
        raise ValueError(operation.name)
    return replace(operation, relu=True)
