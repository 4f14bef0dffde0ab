"""Points to voxels by the rule of spconv's Point2Voxel, which OpenPCDet trains with.

A point's cell is floor((point - minimum) / voxel size) in float32, with a division; cells outside the grid
are dropped. Voxels are numbered by their first point; once `max_num_voxels` exist, points only enter
existing ones; the first `max_points_per_voxel` points of a voxel are kept. A voxel's feature is their mean.

spconv's own implementation keeps a dense table over the grid (168 MB for 1024 x 1024 x 40 cells) in every
loading process, and copies each point into a slot of its voxel; this one sorts the cells, sums the points
where they lie, and gives the same bits.

Shape letters: P points, V voxels, T points per voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cpq_train.common.errors import UserError

_NUM_SUMMED_IN_ORDER = 4
"""torch adds up to four numbers one after the other; of more it adds every fourth first."""

Ints = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


class Voxelizer:
    """Groups points into voxels.

    Args:
        voxel_size: x, y, z in metres.
        point_cloud_range: minimum x, y, z and maximum x, y, z in metres.
        max_points_per_voxel: T.
        max_num_voxels: upper bound of V.

    Raises:
        UserError: sizes, range or limits are no grid.
    """

    def __init__(
        self,
        voxel_size: Sequence[float],
        point_cloud_range: Sequence[float],
        max_points_per_voxel: int,
        max_num_voxels: int,
    ) -> None:
        for name, limit in (
            ("max_points_per_voxel", max_points_per_voxel),
            ("max_num_voxels", max_num_voxels),
        ):
            if limit < 1:
                raise UserError(f"{name} is {limit}: expected 1 or more")
        self._num_cells = grid_cells(voxel_size, point_cloud_range)
        self._size = np.asarray(voxel_size, dtype=np.float32)
        self._low = np.asarray(point_cloud_range[:3], dtype=np.float32)
        self._max_points, self._max_voxels = max_points_per_voxel, max_num_voxels

    def __call__(
        self, points: NDArray[np.float32], order: Ints | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Voxelizes (P, 5) points.

        Args:
            points: x, y, z, intensity, time lag; columns that are contiguous are the fastest.
            order: (P,) the order in which the points come, None for that of their rows.

        Returns:
            Means (V, 5) float32 of the points of each voxel; cells (V, 3) int32 as z, y, x; number of points
            (V,) int32.
        """
        rows, cells = self._cells(points, order)
        by_cell = _argsort(cells)
        starts, counts = _runs(cells[by_cell])
        first_points = by_cell[starts]
        by_first = _argsort(first_points)[: self._max_voxels]

        counts = np.minimum(counts[by_first], self._max_points)
        ends = np.cumsum(counts)
        slots = np.arange(counts.sum()) + np.repeat(starts[by_first] - (ends - counts), counts)
        sums = self._sums(points, gather(rows, gather(by_cell, slots)), ends - counts, counts)
        num_points = torch.from_numpy(counts.astype(np.int32))
        return (
            sums / num_points[:, None].to(sums.dtype),
            torch.from_numpy(self._coordinates(cells[first_points[by_first]])),
            num_points,
        )

    def _cells(self, points: NDArray[np.float32], order: Ints | None) -> tuple[Ints, NDArray[np.int32]]:
        """The points inside the grid, in order, and their cells, numbered with x varying fastest."""
        numbers = np.zeros(len(points), dtype=np.int32)
        is_inside = np.ones(len(points), dtype=np.bool_)
        for axis in (2, 1, 0):
            steps = np.floor((points[:, axis] - self._low[axis]) / self._size[axis])
            is_inside &= (steps >= 0) & (steps < self._num_cells[axis])
            np.clip(steps, 0, self._num_cells[axis], out=steps)
            numbers *= self._num_cells[axis]
            numbers += steps.astype(np.int32)
        rows = np.flatnonzero(is_inside) if order is None else order[is_inside[order]]
        return rows, gather(numbers, rows)

    def _sums(self, points: NDArray[np.float32], rows: Ints, starts: Ints, counts: Ints) -> Tensor:
        """Sums (V, 5) of the points in `rows[starts[v] :][: counts[v]]`, as torch sums (V, T, 5) over T."""
        table = torch.from_numpy(points).contiguous()
        sums = functional.embedding_bag(torch.from_numpy(rows), table, torch.from_numpy(starts), mode="sum")
        crowded = np.flatnonzero(counts > _NUM_SUMMED_IN_ORDER)
        slots = np.arange(self._max_points)
        is_filled = slots < counts[crowded, None]
        members = gather(rows, (starts[crowded, None] + slots * is_filled).ravel())
        padded = table.index_select(0, torch.from_numpy(members)) * torch.from_numpy(is_filled).view(-1, 1)
        sums[crowded] = padded.view(-1, self._max_points, table.shape[1]).sum(dim=1)
        return sums

    def _coordinates(self, cells: NDArray[np.int32]) -> NDArray[np.int32]:
        x_cells, y_cells, _ = self._num_cells
        rows, x = np.divmod(cells, np.int32(x_cells))
        z, y = np.divmod(rows, np.int32(y_cells))
        return np.stack([z, y, x], axis=1)


def _argsort(numbers: NDArray[np.signedinteger[Any]]) -> Ints:
    """Stable order of numbers in 0 to 2^31. Numpy sorts 16-bit numbers by radix, others far slower."""
    order = np.argsort(numbers.astype(np.uint16), kind="stable")
    high = (numbers >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")]


def _runs(ordered: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Starts and lengths of the runs of equal numbers."""
    is_start = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_start[1:])
    starts = np.flatnonzero(is_start)
    return starts, np.diff(starts, append=len(ordered))


def gather(values: NDArray[Scalar], rows: Ints) -> NDArray[Scalar]:
    """Some values: torch gathers several times as fast as numpy."""
    gathered: NDArray[Scalar] = torch.from_numpy(values).index_select(0, torch.from_numpy(rows)).numpy()
    return gathered


def grid_cells(voxel_size: Sequence[float], point_cloud_range: Sequence[float]) -> tuple[int, int, int]:
    """Number of cells in x, y, z.

    Raises:
        UserError: the range is no whole number of voxels, or has more than 2^31 cells.
    """
    if len(voxel_size) != 3 or len(point_cloud_range) != 6:
        raise UserError(
            f"voxel_size {list(voxel_size)}, point_cloud_range {list(point_cloud_range)}: "
            "expected 3 and 6 numbers"
        )
    numbers = []
    for axis, size, low, high in zip(
        "xyz", voxel_size, point_cloud_range[:3], point_cloud_range[3:], strict=True
    ):
        cells = (high - low) / size if size > 0 else 0.0
        if cells < 0.5 or abs(cells - round(cells)) > 1e-3:
            raise UserError(
                f"point_cloud_range {low} to {high} m in {axis} is {cells:.6g} voxels of {size} m: "
                "expected a whole number"
            )
        numbers.append(round(cells))
    x, y, z = numbers
    if x * y * z >= 2**31:
        raise UserError(f"the grid has {x} x {y} x {z} cells: expected fewer than 2^31 in all")
    return x, y, z
