"""Points to voxels by spconv's rule, which OpenPCDet trains with.

A point's cell is floor((point - minimum) / voxel size) in float32, with a division; cells outside the grid
are dropped. Voxels are numbered by their first point; once `max_num_voxels` exist, points only enter existing
ones; the first `max_points_per_voxel` points of a voxel are kept. Shape letters: P points, V voxels, T points
per voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.errors import UserError

NUM_POINT_FEATURES = 5
"""x, y, z, intensity, time lag."""


class Voxelizer:
    """Groups points into voxels.

    Holds a dense table over the grid (168 MB for 1024 x 1024 x 40 cells), so make one per process and keep
    it.

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
        check_grid(voxel_size, point_cloud_range)
        for name, value in (
            ("max_points_per_voxel", max_points_per_voxel),
            ("max_num_voxels", max_num_voxels),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}: expected 1 or more")
        from spconv.pytorch.utils import PointToVoxel

        self._generator = PointToVoxel(
            vsize_xyz=list(voxel_size),
            coors_range_xyz=list(point_cloud_range),
            num_point_features=NUM_POINT_FEATURES,
            max_num_voxels=max_num_voxels,
            max_num_points_per_voxel=max_points_per_voxel,
            device=torch.device("cpu"),
        )

    def __call__(self, points: NDArray[np.float32]) -> tuple[Tensor, Tensor, Tensor]:
        """Voxelizes (P, 5) points.

        Returns:
            Voxels (V, T, 5) float32, zero where a voxel has fewer than T points; cells (V, 3) int32 as z, y,
            x; number of points (V,) int32.
        """
        voxels, cells, num_points = self._generator(torch.from_numpy(np.ascontiguousarray(points)))
        return voxels, cells, num_points


def mean_voxel_features(voxels_VT5: Tensor, num_points_V: Tensor) -> Tensor:
    """Mean (V, 5) over the points of each voxel."""
    return voxels_VT5.sum(dim=1) / num_points_V[:, None].to(voxels_VT5.dtype)


def check_grid(voxel_size: Sequence[float], point_cloud_range: Sequence[float]) -> None:
    """Checks that the range is a whole number of voxels.

    Raises:
        UserError: it is not, or a side is empty.
    """
    if len(voxel_size) != 3 or len(point_cloud_range) != 6:
        raise UserError(
            f"voxel_size {list(voxel_size)} and point_cloud_range {list(point_cloud_range)}: expected 3 and 6 numbers"
        )
    for axis, size, low, high in zip(
        "xyz", voxel_size, point_cloud_range, point_cloud_range[3:], strict=False
    ):
        cells = (high - low) / size if size > 0 else 0.0
        if cells < 1 or abs(cells - round(cells)) > 1e-3:
            raise UserError(
                f"point_cloud_range {low} to {high} m in {axis} with voxels of {size} m is {cells:.4g} cells: "
                "expected a whole number"
            )
