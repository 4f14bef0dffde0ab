"""A plan of the dense part as ONNX in the form that TensorRT 10 and 11 read; not run in TensorRT here.

The quantization is explicit and the types are strong: codes exist between a QuantizeLinear and a
DequantizeLinear, int8 with zero point 0, one pair for each tensor and range, in front of the convolutions
that read it. Outputs of layers are left alone, so a concatenation is quantized behind it, once. Weights are
codes in int8 behind a DequantizeLinear: those of 4 bits as well, with their own step. Biases are fp32. A
float layer is a Conv with fp32 weights that reads the tensor as it is.

QuantizeLinear saturates at -128 and 127; where codes end earlier, a Clip stands in front of it. A transposed
convolution whose kernel is its stride is a 1x1 Conv and DepthToSpace: on the axis of the scales of a
ConvTranspose releases of TensorRT have disagreed (NVIDIA/TensorRT issue 1694).

Letters: C C' input and output channels, H W rows and columns of a map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.export.dense_form import as_convolution
from cpq_train.export.graph import Graph, onnx
from cpq_train.export.parts import MAP, shapes
from cpq_train.export.plan import Addition, Concatenation, Convolution, HeightMap, InputRange, Operation, Plan
from cpq_train.export.tensorrt.lint import lint
from cpq_train.export.tensorrt.notes import KEY, bias_values, note_of

SMALLEST, LARGEST = -128, 127
"""Codes at which QuantizeLinear saturates (TensorRT 10.16, NvInfer.h, IQuantizeLayer)."""


def why_not(plan: Plan) -> dict[str, str]:
    """Name -> reason of every operation that a TensorRT file cannot hold."""
    reasons = {operation.name: _why_not(operation) for operation in plan.operations}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_not(operation: Operation) -> str:
    if isinstance(operation, Concatenation):
        return ""
    if isinstance(operation, Addition | HeightMap) or operation.is_sparse:
        return "works on voxels, for which TensorRT has no operators: export them to another target"
    chosen = operation.input_range
    if chosen is not None and chosen.largest > LARGEST:
        return (
            f"codes of its input up to {chosen.largest}: TensorRT's go up to {LARGEST}; give it "
            "input: {bits: 8, signed: true}"
        )
    return ""


def model_of(plan: Plan, version: str, documentation: str) -> Any:
    """The content of a file.

    The input is the map, `spatial_features` (1, C, H, W) float32; outputs are those of the plan, (1, C, H, W)
    float32, and so they are in an engine (`trtexec_line` says why): who has a map in fp16 widens it before.

    Args:
        plan: Of the dense part, without any reason of `why_not`.
        version: Of this package.
        documentation: Where the plan comes from.

    Raises:
        UserError: It breaks a rule of TensorRT.
    """
    model = _Writer(plan).write().model("centerpoint", version, documentation)
    onnx.helper.set_model_props(model, {KEY: note_of(plan)})
    if findings := lint(model):
        raise UserError("TensorRT would not take the file:\n  " + "\n  ".join(map(str, findings)))
    return model


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.graph = plan, Graph()
        self.code_names, self.shapes = plan.code_tensors(), shapes(plan)

    def write(self) -> Graph:
        graph, plan = self.graph, self.plan
        graph.input(MAP, np.float32, [1, plan.num_features, *plan.grid])
        graph.node("Identity", [MAP], plan.source)
        for operation in plan.operations:
            if isinstance(operation, Convolution):
                self._convolution(operation)
            else:
                graph.node("Concat", operation.sources, operation.name, axis=1)
        for name, tensor in plan.outputs.items():
            graph.output(name, tensor, [1, *self.shapes[tensor]])
        return graph

    def _convolution(self, layer: Convolution) -> None:
        """(1, C, H, W) -> (1, C', H', W')."""
        graph, source = self.graph, layer.source
        weight, attributes, num_copies = as_convolution(layer)
        if layer.input_range is not None:
            source = self._rounded(layer.source, layer.input_range)
        inputs = [source, self._weight(layer, weight, num_copies)]
        if layer.bias is not None:
            inputs.append(graph.initializer(f"{layer.name}.bias", np.repeat(bias_values(layer), num_copies)))
        steps: list[tuple[str, list[str], dict[str, Any]]] = [("Conv", inputs, attributes)]
        if layer.relu:
            steps.append(("Relu", [], {}))
        if layer.kind == "ConvTranspose2d":
            steps.append(("DepthToSpace", [], {"blocksize": layer.kernel.size[0], "mode": "CRD"}))
        self._chain(layer.name, steps)

    def _chain(self, name: str, steps: list[tuple[str, list[str], dict[str, Any]]]) -> None:
        """Nodes that read one another, of which the last one makes a tensor."""
        tensor: list[str] = []
        for number, (operator, inputs, attributes) in enumerate(steps, start=1):
            output = name if number == len(steps) else f"{name}.{operator.lower()}"
            tensor = [self.graph.node(operator, [*tensor, *inputs], output, **attributes)]

    def _weight(self, layer: Convolution, weight: NDArray[Any], num_copies: int) -> str:
        graph, name = self.graph, layer.name
        if layer.weight_step is None:
            return graph.initializer(f"{name}.weight", weight)
        codes = graph.initializer(f"{name}.weight_codes", weight)
        steps = graph.initializer(f"{name}.weight_step", np.repeat(layer.weight_step, num_copies))
        return graph.node("DequantizeLinear", [codes, steps], f"{name}.weight", axis=0)

    def _rounded(self, tensor: str, chosen: InputRange) -> str:
        """A tensor rounded to what codes can say, made once for all readers."""
        graph, codes = self.graph, self.code_names[tensor, chosen]
        values = f"{codes}.values"
        if values not in graph:
            pair = [graph.initializer(f"{codes}.step", np.array(chosen.step)), graph.integer(0, np.int8)]
            graph.node("QuantizeLinear", [self._clipped(tensor, chosen, codes), *pair], codes)
            graph.node("DequantizeLinear", [codes, *pair], values)
        return values

    def _clipped(self, tensor: str, chosen: InputRange, codes: str) -> str:
        smallest = SMALLEST if self.plan.is_non_negative(tensor) else chosen.smallest
        if (smallest, chosen.largest) == (SMALLEST, LARGEST):
            return tensor
        limits = [
            self.graph.initializer(f"{codes}.{name}", np.array(np.float32(code) * chosen.step))
            for name, code in (("least", chosen.smallest), ("most", chosen.largest))
        ]
        return self.graph.node("Clip", [tensor, *limits], f"{codes}.clipped")
