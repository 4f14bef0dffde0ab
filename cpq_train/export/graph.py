"""An ONNX graph put together node by node; every tensor has a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.packages import require

onnx = require("onnx")

OPSET = 19
"""Of the standard operators; onnxruntime 1.20 to 1.32 were seen to run it."""

IR_VERSION = 9
"""Of the file format, the one that belongs to the opset."""

NAMED = ("Conv", "ConvTranspose", "MatMul", "MatMulInteger")
"""Operators whose nodes have names."""


class Graph:
    """Nodes, initializers, inputs and outputs of a file in the making."""

    def __init__(self) -> None:
        self._nodes: dict[str, Any] = {}
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __contains__(self, tensor: str) -> bool:
        """Whether a node makes a tensor of this name."""
        return tensor in self._nodes

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node.

        Returns:
            The name of its output; only nodes that multiply have names of their own, for a runtime's profile.
        """
        assert output not in self._nodes, f"two nodes make {output}"
        name = output if operator in NAMED else None
        self._nodes[output] = onnx.helper.make_node(operator, inputs, [output], name=name, **attributes)
        return output

    def cast(self, tensor: str, dtype: type[np.generic], output: str) -> str:
        """Append a change of type."""
        return self.node("Cast", [tensor], output, to=_onnx_type(dtype))

    def filled(self, shape: str, value: np.generic, output: str) -> str:
        """Append a tensor of one value; `shape` names a 1-D tensor."""
        one = onnx.numpy_helper.from_array(np.array([value]))
        return self.node("ConstantOfShape", [shape], output, value=one)

    def initializer(self, name: str, values: NDArray[Any]) -> str:
        """Numbers of the file under a name; the same numbers may come again."""
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(np.array(values, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 tensor, named by its numbers."""
        return self.initializer(f"ints:{','.join(map(str, values))}", np.array(values, np.int64))

    def integer(self, value: int, dtype: type[np.generic] = np.int64) -> str:
        """A scalar of an integer type, named by its value."""
        return self.initializer(f"{dtype.__name__}:{value}", np.array(value, dtype))

    def number(self, value: float) -> str:
        """An fp32 scalar, named by its value."""
        return self.initializer(f"number:{value!r}", np.array(value, np.float32))

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """Declare an input; letters in its shape are free sizes."""
        self._inputs.append(onnx.helper.make_tensor_value_info(name, _onnx_type(dtype), shape))
        return name

    def output(self, name: str, tensor: str, shape: Sequence[int | str]) -> None:
        """Declare a tensor an fp32 output of the file."""
        self.node("Identity", [tensor], name)
        self._outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    def model(self, name: str, version: str, documentation: str) -> Any:
        """The file, checked by onnx's own checker."""
        graph = onnx.helper.make_graph(
            list(self._nodes.values()), name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="cpq_train",
            producer_version=version,
            doc_string=documentation,
        )
        onnx.checker.check_model(model)
        return model


def _onnx_type(dtype: type[np.generic]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
