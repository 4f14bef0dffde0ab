"""The ONNX dialect of NVIDIA's libspconv: nodes, attributes, and the names that parsers look for.

From github.com/NVIDIA-AI-IOT/Lidar_AI_Solution at 787ad9549d2573a1a543fd1c03fb5835e580aafb:
`libraries/3DSparseConvolution/src/onnx-parser.cpp`, which fills the engine, and
`CUDA-CenterPoint/qat/onnx_export/exptool.py`, which writes NVIDIA's files. What the engine makes of them, a
closed library, is seen in an open rewrite: github.com/riteshkhrn/Lidar_AI_Solution at
160f3ecff8c1f54a9051eb1a21f3f02410053a4b, `libraries/New3DSparseConvolution/libspconv/src`. The parser also
knows QuantAdd, Transpose, and attributes that NVIDIA's exporter leaves to their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cpq_train.common.errors import UserError
from cpq_train.export.graph import onnx

DOMAIN, OPSET, IR_VERSION = "ai.onnx", 11, 6
"""What NVIDIA's files say of their operators; IR_VERSION is the one that belongs to the opset."""

GRAPH_NAME = "scn"

INT8, FP16 = "int8", "fp16"
"""Values of `precision` and `output_precision`."""

OUTPUT_BOUND = 200_000
"""Voxels that a layer may have, NVIDIA's number; the parser's own is 150,000."""

NUM_VOXELS = 1
"""Of the example that NVIDIA's exporter writes down, if it is given none; no parser asks."""

_Type = onnx.AttributeProto
_Types = Mapping[str, int]

_PRECISIONS = {"precision": _Type.STRING, "output_precision": _Type.STRING}


class Operator(NamedTuple):
    """A kind of node.

    Attributes:
        inputs: What each is: a tensor, or numbers whose name holds this word.
        attributes: Name -> type of those that every node has, in their order.
        ranges: The same of those that come with int8.
    """

    inputs: tuple[str, ...]
    attributes: _Types
    ranges: _Types


OPERATORS = {
    "SparseConvolution": Operator(
        ("tensor", "weight", "bias"),
        {
            "ndim": _Type.INT,
            "input_spatial_shape": _Type.INTS,
            "output_spatial_shape": _Type.INTS,
            "in_channels": _Type.INT,
            "out_channels": _Type.INT,
            "kernel_size": _Type.INTS,
            "output_bound": _Type.INT,
            "stride": _Type.INTS,
            "dilation": _Type.INTS,
            "padding": _Type.INTS,
            "transposed": _Type.INT,
            "inverse": _Type.INT,
            "output_padding": _Type.INTS,
            "groups": _Type.INT,
            "subm": _Type.INT,
            "rulebook": _Type.STRING,
            "activation": _Type.STRING,
            "input_shape": _Type.INTS,
            "output_shape": _Type.INTS,
            "weight_dynamic_ranges": _Type.FLOATS,
            **_PRECISIONS,
        },
        {"input_dynamic_range": _Type.FLOAT},
    ),
    "Add": Operator(
        ("tensor", "tensor"),
        _PRECISIONS,
        {"input0_dynamic_range": _Type.FLOAT, "input1_dynamic_range": _Type.FLOAT},
    ),
    "Relu": Operator(("tensor",), {}, {}),
    "ScatterDense": Operator(
        ("tensor",),
        {"input_spatial_shape": _Type.INTS, "format": _Type.STRING, "output_shape": _Type.INTS},
        {},
    ),
    "Reshape": Operator(("tensor",), {"dims": _Type.INTS}, {}),
}
"""Type of a node -> what it has. Weights are KRSC, FLOAT16 in `raw_data` as are biases; `format` is zyx."""


def new_node(operator: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> Any:
    """A node of the dialect, its attributes in the types and the order of the table."""
    made = onnx.helper.make_node(operator, inputs, [output], name)
    types = _types(operator)
    assert attributes.keys() <= types.keys(), attributes.keys() - types.keys()
    made.attribute.extend(
        onnx.helper.make_attribute(name, attributes[name], attr_type=kind)
        for name, kind in types.items()
        if name in attributes
    )
    return made


def check_model(model: Any, where: str) -> None:
    """Whether a file is a graph of nodes of the dialect.

    Args:
        model: The file.
        where: What to call it in messages.

    Raises:
        UserError: It is not; names the first node that is none.
        Exception: Of onnx's checker: it is no graph.
    """
    # The checker knows standard operators alone: it is told that these are another domain's.
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.opset_import.append(onnx.helper.make_opsetid("libspconv", 1))
    for node in copy.graph.node:
        node.domain = "libspconv"
    onnx.checker.check_model(copy)
    for node in model.graph.node:
        if finding := _finding(node):
            raise UserError(f"{where}: node {node.name!r}: {finding}")


def _finding(node: Any) -> str:
    """What is wrong with a node; nothing where it is one of the dialect."""
    if node.op_type not in OPERATORS:
        return f"{node.op_type} is no operator of libspconv; accepted: {', '.join(OPERATORS)}"
    operator, types = OPERATORS[node.op_type], _types(node.op_type)
    if len(node.input) != len(operator.inputs):
        return f"has {len(node.input)} inputs; expected {len(operator.inputs)}"
    for kind, name in zip(operator.inputs, node.input, strict=True):
        found = [word for word in ("weight", "bias") if word in name] or ["tensor"]
        if found != [kind]:
            return f"input {name!r} has the name of a {' and a '.join(found)}; expected that of a {kind}"
    for one in node.attribute:
        if types.get(one.name) != one.type:
            return f"has an attribute {one.name!r} of type {_Type.AttributeType.Name(one.type)}"
    missing = operator.attributes.keys() - {one.name for one in node.attribute}
    return f"has no attribute {min(missing)!r}" if missing else ""


def _types(operator: str) -> _Types:
    return {**OPERATORS[operator].attributes, **OPERATORS[operator].ranges}
