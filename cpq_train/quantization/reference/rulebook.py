"""Which input row meets which output row under which kernel offset, from coordinates alone.

Letters: V positions, D dimensions of the grid. A position is (batch, *cell). A dense map is a grid with every
position taken, so sparse and dense layers have one rule: the output cell o sees the input cell
o * stride - padding + offset * dilation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Coordinates: TypeAlias = NDArray[np.int64]
"""(V, 1 + D) batch, cell."""

Rows: TypeAlias = NDArray[np.intp]
Rules: TypeAlias = list[tuple[Rows, Rows]]
"""For each kernel offset, in the order of the kernel's memory: rows of the input, rows of the output."""


@dataclass(frozen=True)
class Kernel:
    """Geometry of a convolution, one number per dimension."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Cells of the output grid."""
        dims = zip(shape, self.size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in dims)

    def transposed_shape(self, shape: Sequence[int], extra: Sequence[int]) -> tuple[int, ...]:
        """Cells of the output grid of a transposed convolution, `extra` being its output padding."""
        dims = zip(shape, self.size, self.stride, self.padding, self.dilation, extra, strict=True)
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in dims)


def grid(batch_size: int, shape: Sequence[int]) -> Coordinates:
    """Every position of a dense map, in the order of its memory."""
    return np.indices((batch_size, *shape)).reshape(1 + len(shape), -1).T


def output_positions(positions: Coordinates, shape: Sequence[int], kernel: Kernel) -> Coordinates:
    """Every position whose window meets an input, in rising order."""
    seen = np.concatenate([cells for _, cells in _seen_from(positions, shape, kernel)])
    _, first = np.unique(_keys(seen, shape), return_index=True)
    return seen[first]


def rules(inputs: Coordinates, outputs: Coordinates, shape: Sequence[int], kernel: Kernel) -> Rules:
    """The pairs of rows that each kernel offset multiplies.

    Args:
        inputs: Positions of the input rows.
        outputs: Positions of the output rows.
        shape: Cells of the output grid.
        kernel: Geometry.
    """
    row_of, found = RowOf(outputs, shape), []
    for rows, cells in _seen_from(inputs, shape, kernel):
        targets = row_of(cells)
        found.append((rows[targets >= 0], targets[targets >= 0]))
    return found


class RowOf:
    """The row of a position among others, found by binary search.

    Args:
        positions: The others, each once.
        shape: Cells of their grid.
    """

    def __init__(self, positions: Coordinates, shape: Sequence[int]) -> None:
        keys = _keys(positions, shape)
        self._shape, self._order = shape, np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def __call__(self, wanted: Coordinates) -> Rows:
        """Rows (V,) of the wanted positions, -1 where it is not one of them."""
        if not len(self._keys):
            return np.full(len(wanted), -1)
        keys = _keys(wanted, self._shape)
        nearest = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[nearest] == keys, self._order[nearest], -1)


def _seen_from(
    positions: Coordinates, shape: Sequence[int], kernel: Kernel
) -> Iterator[tuple[Rows, Coordinates]]:
    """For each offset the input rows that some output cell sees there, and those output cells."""
    for offset in np.ndindex(*kernel.size):
        moved = positions[:, 1:] + kernel.padding - np.multiply(offset, kernel.dilation)
        cells = moved // kernel.stride
        inside = ((cells * kernel.stride == moved) & (cells >= 0) & (cells < shape)).all(1)
        rows = np.flatnonzero(inside)
        yield rows, np.column_stack([positions[rows, 0], cells[rows]])


def _keys(positions: Coordinates, shape: Sequence[int]) -> NDArray[np.int64]:
    """One number per position, rising with the order of (batch, *cell)."""
    keys = positions[:, 0].astype(np.int64)
    for cell, size in zip(positions.T[1:], shape, strict=True):
        keys = keys * size + cell
    return keys
