"""A model as the rules of `lint.py` look at it: who makes and reads a tensor, its type and shape."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.graph import onnx

UNKNOWN = 0
"""The type of a tensor of which nothing is known."""


class ModelView:
    """A model and what follows from it.

    Attributes:
        model: The model.
        nodes: Of its graph.
        makers: Tensor -> the node that makes it.
        readers: Tensor -> the nodes that read it.
        types: Tensor -> its ONNX type, of inputs, outputs, numbers and all whose type follows from theirs.
        dims: Tensor -> its sizes, None for each that is free or does not follow.
    """

    def __init__(self, model: Any) -> None:
        self.model, graph = model, model.graph
        self.nodes = list(graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self._numbers = {one.name: one for one in graph.initializer}
        self.types = {one.name: one.data_type for one in graph.initializer}
        self.dims: dict[str, list[int | None]] = {one.name: list(one.dims) for one in graph.initializer}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        for one in (*inferred.input, *inferred.value_info, *inferred.output):
            tensor = one.type.tensor_type
            self.types[one.name] = tensor.elem_type
            sizes = tensor.shape.dim if tensor.HasField("shape") else [onnx.TensorShapeProto.Dimension()]
            self.dims[one.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in sizes]

    def type_of(self, tensor: str) -> int:
        """The ONNX type of a tensor."""
        return int(self.types.get(tensor, UNKNOWN))

    def numbers(self, tensor: str) -> NDArray[Any] | None:
        """The numbers of an initializer; None where a tensor is computed."""
        one = self._numbers.get(tensor)
        return None if one is None else np.asarray(onnx.numpy_helper.to_array(one))

    def maker(self, tensor: str, operator: str) -> Any:
        """The node that makes a tensor, if it is of an operator; else None."""
        node = self.makers.get(tensor)
        return node if node is not None and node.op_type == operator else None

    def of(self, *operators: str) -> list[Any]:
        """The nodes of some operators."""
        return [node for node in self.nodes if node.op_type in operators]
