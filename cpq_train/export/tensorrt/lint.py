"""The rules that a file has to keep for TensorRT 10 and 11 to build it, each with where it is written.

Sources, and how they are cited: `operators.md` and `onnxOpImporters.cpp` of onnx/onnx-tensorrt for TensorRT
10.1 where no other release is named; `NvInfer.h` of NVIDIA/TensorRT at tag v10.16; issues of NVIDIA/TensorRT;
pages of docs.nvidia.com/deeplearning/tensorrt. No file was built by TensorRT here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cpq_train.export.graph import onnx
from cpq_train.export.tensorrt.model_view import UNKNOWN, ModelView

OPSETS = range(9, 21)

OPERATORS = (
    *("Clip", "Concat", "Conv", "DepthToSpace", "Identity", "Relu"),
    *("QuantizeLinear", "DequantizeLinear"),
)
"""What the writer needs; `operators.md` has each of them for FP32 (DequantizeLinear for INT8)."""

DOMAINS = ("", "ai.onnx")

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

Seen: TypeAlias = Iterator[tuple[str, str]]
"""Tensors that break a rule, and how."""


class Rule(NamedTuple):
    """What every file keeps.

    Attributes:
        sentence: The rule.
        source: Where it is written.
        check: Finds what breaks it.
    """

    sentence: str
    source: str
    check: Callable[[ModelView], Seen]


class Finding(NamedTuple):
    """A rule that a model breaks.

    Attributes:
        rule: Its id.
        tensor: Where: the first output of a node, or another tensor.
        seen: What is there.
    """

    rule: str
    tensor: str
    seen: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.seen} ({self.rule}: {RULES[self.rule].sentence})"


def lint(model: Any) -> list[Finding]:
    """What of a model TensorRT would not take, or not as onnxruntime does.

    Args:
        model: One that onnx's checker and shape inference accept.
    """
    view = ModelView(model)
    return [Finding(name, *seen) for name, rule in RULES.items() for seen in rule.check(view)]


def _opset(view: ModelView) -> Seen:
    for one in view.model.opset_import:
        if one.domain in DOMAINS and one.version not in OPSETS:
            yield "opset_import", f"opset {one.version}"


def _operators(view: ModelView) -> Seen:
    for node in view.nodes:
        if node.domain not in DOMAINS or node.op_type not in (*OPERATORS, "ConvTranspose"):
            yield node.output[0], f"operator {node.domain and node.domain + ' '}{node.op_type}"


def _deconvolutions(view: ModelView) -> Seen:
    for node in view.of("ConvTranspose"):
        yield node.output[0], "a ConvTranspose"


def _shapes(view: ModelView) -> Seen:
    for name, dims in view.dims.items():
        if None in dims:
            yield name, f"shape {dims}".replace("None", "?")


def _uint8(view: ModelView) -> Seen:
    for name, kind in view.types.items():
        if kind == onnx.TensorProto.UINT8:
            yield name, "UINT8"


def _int8(view: ModelView) -> Seen:
    for name, kind in view.types.items():
        for node in view.readers[name] if kind == onnx.TensorProto.INT8 else ():
            is_zero_point = node.op_type == "QuantizeLinear" and list(node.input).index(name) == 2
            if node.op_type != "DequantizeLinear" and not is_zero_point:
                yield node.output[0], f"{node.op_type} of INT8 {name!r}"


def _zero_points(view: ModelView) -> Seen:
    for node in view.of("QuantizeLinear", "DequantizeLinear"):
        if len(node.input) < 3:
            continue
        zeros, scale = view.numbers(node.input[2]), view.numbers(node.input[1])
        if zeros is None or zeros.any():
            yield node.output[0], "a zero point that is no constant of zeros"
        elif scale is not None and zeros.size != scale.size:
            yield node.output[0], f"{zeros.size} zero points for {scale.size} scales"


def _scales(view: ModelView) -> Seen:
    for node in view.of("QuantizeLinear", "DequantizeLinear"):
        scale = view.numbers(node.input[1])
        if scale is None:
            yield node.output[0], f"scale {node.input[1]!r} is computed"
        elif not scale.size or not (np.isfinite(scale) & (scale >= np.finfo(scale.dtype).tiny)).all():
            yield node.output[0], f"scales from {scale.min(initial=np.inf):g} to {scale.max(initial=0):g}"


def _axes(view: ModelView) -> Seen:
    for node in view.of("QuantizeLinear", "DequantizeLinear"):
        data, scale = node.input[:2]
        numbers, dims = view.numbers(scale), view.dims.get(data, [])
        if numbers is None or not numbers.ndim:
            continue
        axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
        if view.numbers(data) is None:
            yield node.output[0], f"{numbers.size} scales of a tensor that is no constant"
        elif not -len(dims) <= axis < len(dims) or dims[axis] != numbers.size:
            yield node.output[0], f"{numbers.size} scales on axis {axis} of {dims}"


def _weights(view: ModelView) -> Seen:
    for node in view.of("Conv"):
        if not _weight_type(view, node):
            yield node.output[0], f"its weight {node.input[1]!r} is neither"


def _weight_type(view: ModelView, node: Any) -> int:
    """The type of the numbers of a Conv's weight; UNKNOWN where the rule about weights is broken."""
    weight, has_pair = node.input[1], view.maker(node.input[1], "DequantizeLinear")
    numbers = has_pair.input[0] if has_pair else weight
    accepted = (onnx.TensorProto.INT8,) if has_pair else FLOATS
    kind = view.type_of(numbers)
    return kind if view.numbers(numbers) is not None and kind in accepted else UNKNOWN


def _inputs(view: ModelView) -> Seen:
    for node in view.of("Conv"):
        weight, pair = _weight_type(view, node), view.maker(node.input[0], "DequantizeLinear")
        if weight in FLOATS and pair:
            yield node.output[0], "float weights and a quantized input"
        elif weight == onnx.TensorProto.INT8 and not pair:
            yield (
                node.output[0],
                f"INT8 weights and the input {node.input[0]!r}, which no DequantizeLinear makes",
            )
    for node in view.of("DequantizeLinear"):
        if view.numbers(node.input[0]) is None:
            maker = view.maker(node.input[0], "QuantizeLinear")
            if maker is None or list(maker.input[1:]) != list(node.input[1:]):
                yield node.output[0], "no QuantizeLinear of the same scale makes its codes"


def _biases(view: ModelView) -> Seen:
    for node in view.of("Conv"):
        if len(node.input) == 3:
            bias, dims = node.input[2], view.dims.get(node.input[1], [])
            if view.numbers(bias) is None or view.type_of(bias) not in FLOATS or view.dims[bias] != dims[:1]:
                kind = onnx.TensorProto.DataType.Name(view.type_of(bias))
                yield node.output[0], f"bias {bias!r} of {kind} {view.dims.get(bias)}"


def _types(view: ModelView) -> Seen:
    for node in view.of("Clip", "Concat", "Conv", "QuantizeLinear"):
        kinds = {view.type_of(name) for name in node.input} & {*FLOATS}
        if len(kinds) > 1:
            names = " and ".join(onnx.TensorProto.DataType.Name(kind) for kind in sorted(kinds))
            yield node.output[0], f"{node.op_type} of {names}"


RULES = {
    "opset": Rule(
        f"operators are of an opset from {OPSETS[0]} to {OPSETS[-1]}",
        "operators.md of 10.1: 9 to 20; of 10.15: 9 to 24",
        _opset,
    ),
    "operator": Rule(
        f"operators are {', '.join(OPERATORS)}",
        "operators.md of 10.1 and 10.15, which have none of QLinearConv, ConvInteger, MatMulInteger, "
        "DynamicQuantizeLinear, Compress and Unique",
        _operators,
    ),
    "deconvolution": Rule(
        "a transposed convolution is a Conv and DepthToSpace",
        "issues 1694 and 1699: with its scales on axis 1, that of its outputs, 8.2 gave other numbers, and "
        "NVIDIA advised axis 0; onnxruntime has axis 1 (its pull request 19996)",
        _deconvolutions,
    ),
    "shape": Rule(
        "every size is fixed",
        "Working with Dynamic Shapes: free sizes need an optimization profile, and `trtexec_line` gives none",
        _shapes,
    ),
    "uint8": Rule(
        "nothing is UINT8; a QuantizeLinear without a zero point would be",
        "operators.md: UINT8 only as network input or output; onnxOpImporters.cpp, QuantDequantLinearHelper: "
        "a UINT8 zero point is taken for INT8",
        _uint8,
    ),
    "int8": Rule(
        "INT8 is read by DequantizeLinear alone",
        "operators.md: INT8 is a quantized type, and no other operator of the list takes it",
        _int8,
    ),
    "zero-point": Rule(
        "zero points are zeros, as many as scales",
        "operators.md: `y_zero_point` must be 0; onnxOpImporters.cpp, QuantDequantLinearHelper",
        _zero_points,
    ),
    "scale": Rule(
        "scales are constants, positive, finite and normal numbers",
        "NvInfer.h, IQuantizeLayer: a build-time constant, strictly positive; onnxOpImporters.cpp likewise",
        _scales,
    ),
    "axis": Rule(
        "several scales belong to a weight, as many as its axis is long",
        "NvInfer.h, IQuantizeLayer: per-channel for weights only, the size of the quantization axis",
        _axes,
    ),
    "weight": Rule(
        "the weight of a Conv is a float constant, or an INT8 one with DequantizeLinear between",
        "Explicit Quantization, Quantized Weights",
        _weights,
    ),
    "pair": Rule(
        "a Conv reads INT8 weights and a QuantizeLinear-DequantizeLinear pair of one scale, or neither",
        "Explicit Quantization, Q/DQ Layer-Placement Recommendations: all inputs of weighted operations",
        _inputs,
    ),
    "bias": Rule(
        "the bias of a Conv is a float constant, one number for each output channel",
        "onnxOpImporters.cpp, Conv; operators.md: Conv takes FP32, FP16 and BF16",
        _biases,
    ),
    "type": Rule(
        "what a node computes with is of one float type",
        "Strongly Typed Networks; samples/trtexec/README.md, example 6: types are inferred from those of "
        "the inputs and from operators",
        _types,
    ),
}
"""Id -> rule."""
