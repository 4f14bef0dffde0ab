"""What a deployment file says, whatever the target: operations, their numbers, who reads which tensor.

A plan is made from a network (`planning.py`) and read again from what a target's writer wrote; the two have
to be equal bit for bit. A tensor has the name of the operation that makes it.

Letters: C channels, K kernel cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.reference.rulebook import Kernel

FEATURES = "voxel_features"
"""The tensor that a whole network starts from: features of the voxels."""

COORDS = "voxel_coords"
"""Beside it, the cells of the voxels."""

Float32: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class InputRange:
    """How a tensor becomes codes: clip(round_half_even(x * (largest / amax)), smallest, largest).

    Attributes:
        amax: An fp32 number above 0.
        format: The integers.
    """

    amax: float
    format: IntegerFormat

    @property
    def largest(self) -> int:
        """The code of amax."""
        return self.format.qmax

    @property
    def step(self) -> np.float32:
        """The value of code 1."""
        return np.float32(self.amax) / np.float32(self.largest)

    @property
    def smallest(self) -> int:
        """The most negative code."""
        return self.format.qmin


@dataclass(frozen=True)
class Convolution:
    """A convolution, followed by a ReLU or not.

    y = conv(codes_x, codes_w) * (step_x * step_w) + bias, or in float conv(x, w) + bias. A bias of whole
    numbers belongs to the sum: y = (conv(codes_x, codes_w) + bias) * (step_x * step_w).

    Attributes:
        name: Of the layer in the network.
        kind: SubMConv3d, SparseConv3d, Conv2d or ConvTranspose2d.
        source: The tensor that it reads.
        weight: Codes (int8) or float32, laid out as PyTorch and spconv have it.
        weight_step: (C',) value of one code of each output channel; None where the layer is float.
        bias: (C',) float32; int32, whole multiples of step_x * step_w; float16; or None.
        input_range: None where the layer is float.
        kernel: Geometry; a submanifold layer's padding is that which centres its kernel.
        relu: Whether negative results become 0.
    """

    name: str
    kind: str
    source: str
    weight: NDArray[Any]
    weight_step: Float32 | None
    bias: NDArray[Any] | None
    input_range: InputRange | None
    kernel: Kernel
    relu: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that it reads."""
        return (self.source,)

    @property
    def is_sparse(self) -> bool:
        """Whether it works on voxels and not on maps."""
        return self.kind in ("SubMConv3d", "SparseConv3d")


@dataclass(frozen=True)
class Addition:
    """The add of a residual block: codes_a * step_a + codes_b * step_b, or in float a + b.

    Attributes:
        name: Of the layer in the network.
        sources: Tensors of the branch and of the identity.
        ranges: Of both; None where the layer is float.
        relu: Whether negative results become 0.
    """

    name: str
    sources: tuple[str, str]
    ranges: tuple[InputRange, InputRange] | None
    relu: bool = False


@dataclass(frozen=True)
class HeightMap:
    """Voxels to a map, height stacked into the channels: channel = c * depth + z, zero where no voxel is."""

    name: str
    sources: tuple[str]


@dataclass(frozen=True)
class Concatenation:
    """Maps joined along the channels."""

    name: str
    sources: tuple[str, ...]


Operation: TypeAlias = Convolution | Addition | HeightMap | Concatenation


@dataclass(frozen=True)
class Plan:
    """A network as operations in the order of the pass.

    Attributes:
        num_features: Features of a voxel, or channels of the map, that it starts from.
        grid: Cells along z, y, x of the grid of these voxels, or rows and columns of this map.
        operations: Each reads what stands before it.
        outputs: Name of an output -> its tensor.
        source: The tensor that it starts from.
    """

    num_features: int
    grid: tuple[int, ...]
    operations: tuple[Operation, ...]
    outputs: Mapping[str, str]
    source: str = FEATURES

    def __getitem__(self, name: str) -> Operation:
        """The operation of a name."""
        return next(operation for operation in self.operations if operation.name == name)

    def reads(self) -> Iterator[tuple[Operation, str, InputRange | None]]:
        """Every read of a tensor: by whom, of which, as which codes (None: as it is)."""
        for operation in self.operations:
            if isinstance(operation, Convolution):
                yield operation, operation.source, operation.input_range
                continue
            ranges = operation.ranges if isinstance(operation, Addition) else None
            for row, source in enumerate(operation.sources):
                yield operation, source, None if ranges is None else ranges[row]

    def code_tensors(self) -> dict[tuple[str, InputRange], str]:
        """Tensor and range -> the name of its codes; readers with equal ranges share them."""
        names: dict[tuple[str, InputRange], str] = {}
        for _, source, chosen in self.reads():
            if chosen is not None and (source, chosen) not in names:
                number = sum(tensor == source for tensor, _ in names) + 1
                names[source, chosen] = f"{source}.codes" + ("" if number == 1 else str(number))
        return names

    def is_non_negative(self, tensor: str) -> bool:
        """Whether a tensor has no negative number: it comes from behind a ReLU."""
        if tensor == self.source:
            return False
        made_by = self[tensor]
        if isinstance(made_by, HeightMap | Concatenation):
            return all(map(self.is_non_negative, made_by.sources))
        return made_by.relu


def differences(plan: Plan, other: Plan) -> list[str]:
    """What two plans do not have in common, a line each; numbers count as equal where all bits are.

    Args:
        plan: One.
        other: The other.
    """
    found = [
        f"{name} is {mine!r} and {theirs!r}"
        for name in ("num_features", "grid", "source")
        if (mine := getattr(plan, name)) != (theirs := getattr(other, name))
    ]
    if dict(plan.outputs) != dict(other.outputs):
        found.append(f"outputs are {dict(plan.outputs)} and {dict(other.outputs)}")
    names = [[operation.name for operation in one.operations] for one in (plan, other)]
    if names[0] != names[1]:
        return [*found, f"operations are {names[0]} and {names[1]}"]
    for mine, theirs in zip(plan.operations, other.operations, strict=True):
        if type(mine) is not type(theirs):
            found.append(f"{mine.name} is a {type(mine).__name__} and a {type(theirs).__name__}")
            continue
        for field in fields(mine):
            values = getattr(mine, field.name), getattr(theirs, field.name)
            if not _is_equal(*values):
                found.append(f"{mine.name}: its {field.name} differs")
    return found


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)
