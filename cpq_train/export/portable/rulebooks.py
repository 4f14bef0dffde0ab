"""Rulebooks in standard operators: which voxel meets which under which kernel cell, from coordinates alone.

A set of voxels has a lookup: the row of each cell of its grid, padded so far that no kernel looks past its
border, and -1 where there is no voxel. A convolution's table has a row for each output voxel and a column for
each kernel cell in the order z, y, x of KRSC weights. A strided convolution has an output wherever its window
meets a voxel: there the largest occupancy under the window is 1. Its rows come in rising order of z, y, x.

Letters: V voxels, V' output voxels, K kernel cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cpq_train.export.graph import Graph
from cpq_train.quantization.reference.rulebook import Kernel

Cells = tuple[int, int, int]
"""Along z, y, x."""


@dataclass(frozen=True)
class Voxels:
    """A set of voxels in a graph.

    Attributes:
        name: Of the set; its tensors begin with it.
        coords: Tensor (V, 3) int64 z, y, x.
        grid: Cells of its grid.
        low: Cells by which its lookup is padded below.
        padded: Cells of its lookup.
        lookup: Tensor (cells of the lookup,) int32; empty where no convolution reads the set.
    """

    name: str
    coords: str
    grid: Cells
    low: Cells
    padded: Cells
    lookup: str


def new_voxels(graph: Graph, name: str, coords: str, grid: Cells, kernels: Sequence[Kernel]) -> Voxels:
    """A set of voxels and its lookup.

    Args:
        graph: Where to.
        name: Of the set.
        coords: Tensor (V, 3) int64.
        grid: Cells of its grid.
        kernels: Of every convolution that reads it.
    """
    if not kernels:
        return Voxels(name, coords, grid, (0, 0, 0), grid, "")
    low = _cells(max(kernel.padding[axis] for kernel in kernels) for axis in range(3))
    high = _cells(max(_reach(kernel, grid, axis) for kernel in kernels) for axis in range(3))
    padded = _cells(a + b + c for a, b, c in zip(low, grid, high, strict=True))
    moved = graph.node("Add", [coords, graph.ints(*low)], f"{name}.moved")
    num_voxels = graph.node("Shape", [coords], f"{name}.num_voxels", start=0, end=1)
    last = graph.node("Squeeze", [graph.cast(num_voxels, np.int32, f"{name}.count")], f"{name}.last")
    zero, one = (graph.integer(value, np.int32) for value in (0, 1))
    rows = graph.node("Range", [zero, last, one], f"{name}.rows")
    empty = graph.filled(graph.ints(int(np.prod(padded))), np.int32(-1), f"{name}.empty")
    cells = _numbers(graph, moved, padded, f"{name}.cells")
    lookup = graph.node("ScatterElements", [empty, cells, rows], f"{name}.lookup", axis=0)
    return Voxels(name, coords, grid, low, padded, lookup)


def table(graph: Graph, voxels: Voxels, kernel: Kernel, outputs: str, name: str) -> str:
    """The table of a convolution.

    Args:
        graph: Where to.
        voxels: What it reads.
        kernel: Its geometry.
        outputs: Tensor (V', 3) of its output voxels.
        name: Of the table.

    Returns:
        Tensor (V', K) int32: rows of `voxels`, -1 where there is none.
    """
    corner = _cells(low - padding for low, padding in zip(voxels.low, kernel.padding, strict=True))
    begin = graph.node("Mul", [outputs, graph.ints(*kernel.stride)], f"{name}.strided")
    begin = graph.node("Add", [begin, graph.ints(*corner)], f"{name}.corner")
    first = _numbers(graph, begin, voxels.padded, f"{name}.first")
    column = graph.node("Unsqueeze", [first, graph.ints(1)], f"{name}.column")
    steps = np.multiply(list(np.ndindex(*kernel.size)), kernel.dilation)
    offsets = np.ravel_multi_index(tuple(steps.T), voxels.padded).astype(np.int64)
    cells = graph.node("Add", [column, graph.initializer(f"{name}.offsets", offsets[None])], f"{name}.cells")
    return graph.node("Gather", [voxels.lookup, cells], name, axis=0)


def strided_outputs(graph: Graph, voxels: Voxels, kernel: Kernel, name: str) -> tuple[str, Cells]:
    """The output voxels of a strided convolution.

    Returns:
        Tensor (V', 3) int64; cells of their grid.
    """
    empty = graph.filled(graph.ints(int(np.prod(voxels.grid))), np.uint8(0), f"{name}.free")
    cells = _numbers(graph, voxels.coords, voxels.grid, f"{name}.taken")
    present = graph.initializer("present", np.array([1], np.uint8))
    ones = graph.node("Expand", [present, f"{voxels.name}.num_voxels"], f"{name}.ones")
    occupied = graph.node("ScatterElements", [empty, cells, ones], f"{name}.occupied", axis=0)
    volume = graph.node("Reshape", [occupied, graph.ints(1, 1, *voxels.grid)], f"{name}.volume")
    met = graph.node(
        "MaxPool",
        [volume],
        f"{name}.met",
        kernel_shape=kernel.size,
        strides=kernel.stride,
        pads=[*kernel.padding, *kernel.padding],
        dilations=kernel.dilation,
    )
    found = graph.node("NonZero", [met], f"{name}.found")
    coords = graph.node("Slice", [found, graph.ints(2), graph.ints(5), graph.ints(0)], f"{name}.zyx")
    return graph.node("Transpose", [coords], f"{name}.coords", perm=[1, 0]), _cells(
        kernel.output_shape(voxels.grid)
    )


def _reach(kernel: Kernel, grid: Cells, axis: int) -> int:
    """Cells past the upper border of a grid that a kernel looks at."""
    last = (kernel.output_shape(grid)[axis] - 1) * kernel.stride[axis] - kernel.padding[axis]
    return max(0, last + kernel.dilation[axis] * (kernel.size[axis] - 1) - (grid[axis] - 1))


def _numbers(graph: Graph, coords: str, grid: Cells, name: str) -> str:
    """Cells (V, 3) -> their numbers (V,) in the order of a grid's memory."""
    _, rows, columns = grid
    parts = graph.node("Mul", [coords, graph.ints(rows * columns, columns, 1)], f"{name}.parts")
    return graph.node("ReduceSum", [parts, graph.ints(1)], name, keepdims=0)


def _cells(numbers: Iterable[int]) -> Cells:
    z, y, x = numbers
    return int(z), int(y), int(x)
