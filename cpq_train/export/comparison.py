"""An engine against the network that its file was made of: codes of every layer, and outputs.

Numbers are compared for equality, with no tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cpq_train.export.engine import Engine, new_session
from cpq_train.export.graph import onnx
from cpq_train.export.parts import shapes
from cpq_train.export.plan import Addition, Convolution, InputRange
from cpq_train.export.portable.fast import in_bytes
from cpq_train.export.portable.writer import coords_name
from cpq_train.export.targets import target_of
from cpq_train.models import HeadOutput
from cpq_train.quantization.verification.codes_read import Read, codes_read, steps_apart
from cpq_train.quantization.verification.end_to_end import Flips

Array = NDArray[Any]

Pair: TypeAlias = tuple[list[HeadOutput], list[HeadOutput]]
"""Outputs of the network and of the engine."""

MADE = ".made"
"""What follows the names of codes that nothing in a cut file reads."""


class Probe:
    """A deployment file with the codes of every layer as further outputs.

    Where kernels round on their own, a code beside a tie changes sums in all layers behind it. So the layers
    on maps of such a file are judged one by one, those that write the heads too: each reads the codes that
    the network had.

    Args:
        engine: What runs the file itself.

    Raises:
        UserError: The file does not have the form that `export` writes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.target = engine, target_of(engine.sidecar.target, str(engine.file))
        self.plan = self.target.read_plan(engine.file)
        model = onnx.load(str(engine.file))
        made = {name for node in model.graph.node for name in node.output}
        names = self.plan.code_tensors()
        self.code_names = {read: name if name in made else in_bytes(name) for read, name in names.items()}
        sparse = [o for o in self.plan.operations if isinstance(o, Convolution) and o.is_sparse]
        coords = {coords_name(self.plan, layer.source) for layer in sparse}
        self.given = {} if self.target.is_exact else _cut(model, self._codes_of_maps())
        for name in (*self.code_names.values(), *sorted(coords)):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(self._made(name)))
        self._session = new_session(model.SerializeToString(), str(engine.file))

    def compare(self, network: nn.Module, inputs: tuple[Tensor, Tensor, int], flips: Flips) -> Pair:
        """Run one sample through both.

        Args:
            network: The network that the file was made of.
            inputs: Features, coordinates and 1.
            flips: The differences are added here.

        Returns:
            Outputs of the network and of the engine.
        """
        features, coords, _ = inputs
        ours, seen = codes_read(network, inputs)
        theirs = self.engine(*inputs)
        values = self.engine.run_sample(self._session, features, coords, self._given(seen))
        for operation in self.plan.operations:
            if operation.name in seen and isinstance(operation, Addition | Convolution):
                self._count(operation, seen[operation.name], values, flips)
        for output in self.engine.sidecar.outputs:
            head, branch = output["head"], output["branch"]
            found = torch.from_numpy(values[output["name"]]) if self.given else theirs[head][branch]
            flips.count_outputs(ours[head][branch].cpu(), found.cpu())
        return ours, theirs

    def _codes_of_maps(self) -> dict[str, tuple[int, ...]]:
        """Codes that layers on maps read -> the shape of the map."""
        layers = [o for o in self.plan.operations if isinstance(o, Convolution) and not o.is_sparse]
        reads = [(layer.source, layer.input_range) for layer in layers if layer.input_range is not None]
        sizes = shapes(self.plan)
        return {self.code_names[read]: (1, *sizes[read[0]]) for read in reads}

    def _made(self, codes: str) -> str:
        """Name of the codes that the engine makes, where those that its layers read are given."""
        return f"{codes}{MADE}" if codes in self.given else codes

    def _given(self, seen: Mapping[str, Read]) -> dict[str, Array]:
        """The network's own codes by the names of the file's."""
        found = {}
        for operation in self.plan.operations:
            if isinstance(operation, Convolution) and operation.input_range is not None:
                name = self.code_names[operation.source, operation.input_range]
                if name in self.given:
                    shape, dtype = self.given[name]
                    found[name] = _cropped(seen[operation.name].codes[0], shape).astype(dtype)
        return found

    def _count(
        self, operation: Addition | Convolution, seen: Read, values: Mapping[str, Array], flips: Flips
    ) -> None:
        for codes, source, chosen in zip(seen.codes, operation.sources, _ranges(operation), strict=True):
            theirs = values[self._made(self.code_names[source, chosen])]
            if seen.positions is None:
                positions, theirs = None, _padded(theirs, codes.shape)
            else:
                positions = np.insert(values[coords_name(self.plan, source)], 0, 0, axis=1)
            flips.count_codes(operation.name, steps_apart(codes, seen, theirs, positions))


def _cut(model: Any, maps: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Make tensors of a file inputs of their readers; those that the file makes are called `<name>.made`.

    Returns:
        Name -> shape and type.
    """
    types = {
        one.name: one.type.tensor_type.elem_type
        for one in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    for node in model.graph.node:
        node.output[:] = [f"{name}{MADE}" if name in maps else name for name in node.output]
    for name, shape in maps.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, types[name], shape))
    return {name: (shape, onnx.helper.tensor_dtype_to_np_dtype(types[name])) for name, shape in maps.items()}


def _cropped(codes: Array, shape: tuple[int, ...]) -> Array:
    """Codes of a map without the zeros around it; see `_padded`."""
    height, width = ((a - b) // 2 for a, b in zip(codes.shape[2:], shape[2:], strict=True))
    return codes[:, :, height : height + shape[2], width : width + shape[3]]


def _padded(codes: Array, shape: tuple[int, ...]) -> Array:
    """Codes of a map with the zeros around it that some layers of the network pad it with beforehand."""
    widths = [(a - b) // 2 for a, b in zip(shape, codes.shape, strict=True)]
    return np.pad(codes, [(width, width) for width in widths])


def _ranges(operation: Addition | Convolution) -> Sequence[InputRange]:
    if isinstance(operation, Addition):
        return operation.ranges or ()
    return () if operation.input_range is None else (operation.input_range,)
