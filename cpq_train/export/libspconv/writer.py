"""A sparse part as an ONNX file of libspconv's dialect.

Tensors have the names that the plan has for them, and so have nodes. A residual block is Add and Relu, which
the engine fuses; a convolution says its ReLU itself. In and out go fp16 features and an fp16 map.
"""

from __future__ import annotations

from typing import Any, cast

from cpq_train.export.graph import onnx
from cpq_train.export.libspconv.arithmetic import (
    Half,
    half_weight,
    largest_weights,
    precisions,
    range_of,
)
from cpq_train.export.libspconv.dialect import (
    DOMAIN,
    FP16,
    GRAPH_NAME,
    INT8,
    IR_VERSION,
    NUM_VOXELS,
    OPSET,
    OUTPUT_BOUND,
    check_model,
    new_node,
)
from cpq_train.export.parts import shapes
from cpq_train.export.plan import Addition, Convolution, Float32, HeightMap, InputRange, Plan
from cpq_train.quantization.reference.rulebook import Kernel


def model_of(plan: Plan, version: str, documentation: str) -> Any:
    """The file of a plan, checked.

    Args:
        plan: A sparse part that `in_half_precision` gave and for which `why_not` knows no reason.
        version: Of this package.
        documentation: A text for the file.
    """
    graph = _Writer(plan).write()
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(DOMAIN, OPSET)],
        ir_version=IR_VERSION,
        producer_name="cpq_train",
        producer_version=version,
        doc_string=documentation,
    )
    check_model(model, GRAPH_NAME)
    return model


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.shapes, self.precisions = plan, shapes(plan), precisions(plan)
        self.nodes: list[Any] = []
        self.numbers: list[Any] = []
        self.rulebooks: dict[tuple[str, Kernel], str] = {}
        """Set of voxels and geometry -> what the layers that share them call their rulebook."""
        self.voxels = {plan.source: plan.source}
        """Tensor of features -> its set of voxels, named by the tensor that had it first."""

    def write(self) -> Any:
        plan = self.plan
        for operation in plan.operations:
            match operation:
                case Convolution():
                    self._convolution(operation)
                case Addition():
                    self._addition(operation)
                case HeightMap():
                    self._height_map(operation)
        for output, tensor in plan.outputs.items():
            dims = [1, *self.shapes[tensor]]
            self.nodes.append(new_node("Reshape", [tensor], output, f"{output}.reshape", dims=dims))
        return onnx.helper.make_graph(
            self.nodes,
            GRAPH_NAME,
            [_value(plan.source, [NUM_VOXELS, plan.num_features])],
            [_value(output, [1, *self.shapes[tensor]]) for output, tensor in plan.outputs.items()],
            self.numbers,
        )

    def _convolution(self, layer: Convolution) -> None:
        name, kernel = layer.name, layer.kernel
        (num_in, *grid), (num_out, *new_grid) = self.shapes[layer.source], self.shapes[name]
        is_submanifold = layer.kind == "SubMConv3d"
        self.voxels[name] = self.voxels[layer.source] if is_submanifold else name
        weight, ranges = _weight(layer)
        of_input = {} if layer.input_range is None else {"input_dynamic_range": layer.input_range.amax}
        node = new_node(
            "SparseConvolution",
            [
                layer.source,
                self._number(f"{name}.weight", weight),
                self._number(f"{name}.bias", cast(Half, layer.bias)),
            ],
            name,
            name,
            ndim=3,
            input_spatial_shape=grid,
            output_spatial_shape=new_grid,
            in_channels=num_in,
            out_channels=num_out,
            kernel_size=kernel.size,
            output_bound=OUTPUT_BOUND,
            stride=kernel.stride,
            dilation=kernel.dilation,
            padding=kernel.padding,
            transposed=0,
            inverse=0,
            output_padding=[0, 0, 0],
            groups=1,
            subm=int(is_submanifold),
            rulebook=self._rulebook(layer) if is_submanifold else "",
            activation="ReLU" if layer.relu else "None",
            input_shape=[NUM_VOXELS, num_in],
            output_shape=[NUM_VOXELS, num_out],
            weight_dynamic_ranges=ranges.tolist(),
            **self._precisions(name, layer.input_range),
            **of_input,
        )
        self.nodes.append(node)

    def _rulebook(self, layer: Convolution) -> str:
        key = self.voxels[layer.source], layer.kernel
        return self.rulebooks.setdefault(key, f"subm{len(self.rulebooks)}")

    def _addition(self, addition: Addition) -> None:
        name, ranges = addition.name, addition.ranges
        self.voxels[name] = self.voxels[addition.sources[0]]
        total = f"{name}.sum" if addition.relu else name
        of_inputs = {f"input{row}_dynamic_range": one.amax for row, one in enumerate(ranges or ())}
        attributes = {**self._precisions(name, ranges and ranges[0]), **of_inputs}
        self.nodes.append(new_node("Add", addition.sources, total, name, **attributes))
        if addition.relu:
            self.nodes.append(new_node("Relu", [total], name, f"{name}.relu"))

    def _precisions(self, name: str, chosen: InputRange | None) -> dict[str, str]:
        precision = FP16 if chosen is None else INT8
        return {"precision": precision, "output_precision": self.precisions[name]}

    def _height_map(self, operation: HeightMap) -> None:
        """Channel by channel, z before y before x: what `HeightMap` has in one dimension less."""
        (source,) = operation.sources
        channels, *grid = self.shapes[source]
        node = new_node(
            "ScatterDense",
            [source],
            operation.name,
            operation.name,
            input_spatial_shape=grid,
            format="zyx",
            output_shape=[1, channels, *grid],
        )
        self.nodes.append(node)

    def _number(self, name: str, values: Half) -> str:
        self.numbers.append(onnx.numpy_helper.from_array(values, name))
        return name


def _weight(layer: Convolution) -> tuple[Half, Float32]:
    """The weight of a convolution, and the range of each output channel.

    Those of a float layer say nothing, but NVIDIA's files have them, and where int8 comes out the engine
    wants as many ranges as biases (Lidar_AI_Solution, issue 186).
    """
    if layer.weight_step is None:
        weight = cast(Half, layer.weight)
        return weight, largest_weights(weight)
    return half_weight(layer.weight, layer.weight_step), range_of(layer.weight_step)


def _value(name: str, shape: list[int]) -> Any:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape)
