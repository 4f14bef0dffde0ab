"""Single clouds as network input, outside of a data set: read from files, or made up.

Letters: P points, V voxels, F features of a point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cpq_train.data.dataset import Batch, Item, SampleConfig, collate, voxelizer_of
from cpq_train.data.points.format import PointFormat
from cpq_train.data.sweeps import NUSCENES_POINTS
from cpq_train.data.voxelization import Voxelizer

Cloud = NDArray[np.float32]
"""(P, F) x, y, z (m), further features (nuScenes: intensity, 0 to 255), time lag (s) in the LiDAR frame."""

SENSOR_HEIGHT_M = 1.84
ELEVATIONS_DEG = np.linspace(-30.67, 10.67, 32)
NUM_AZIMUTHS = 1085
FAR_M = 1000.0
"""Farther than any return."""
EGO_STEP_M = 0.4
"""Driven between two sweeps: 8 m/s at 20 Hz."""


def cloud_item(points: Cloud, voxelize: Voxelizer, row: int, name: str) -> Item:
    """A cloud as a sample without boxes; `row` and `name` take the places of the index row and the token."""
    features, cells, _ = voxelize(points)
    return {
        "voxel_features": features,
        "voxel_coords": cells,
        "gt_boxes": torch.zeros(0, 10),
        "sample_row": row,
        "token": name,
    }


def batch_of_clouds(clouds: Sequence[Cloud], config: SampleConfig, names: Sequence[str]) -> Batch:
    """Voxels of clouds, one sample each, without boxes.

    Args:
        clouds: the points of each sample.
        config: grid and limits.
        names: what to call each sample; the place of a token.
    """
    voxelize = voxelizer_of(config)
    pairs = enumerate(zip(clouds, names, strict=True))
    return collate([cloud_item(points, voxelize, row, name) for row, (points, name) in pairs])


def synthetic_cloud(num_sweeps: int, seed: int, points: PointFormat = NUSCENES_POINTS) -> Cloud:
    """A made-up scene with the density of a nuScenes sample, as a car that drives along x sees it.

    32 rings on rolling ground, with upright surfaces in two thirds of all directions. Features of which
    nothing is known are drawn from 0 to 1.
    """
    tops = [100 if name == "intensity" else 1 for name in points.features[3:-1]]
    rng = np.random.default_rng(seed)
    distance_m = _surface_distances(rng)
    sweeps = []
    for sweep in range(num_sweeps):
        azimuth = np.linspace(0, 2 * np.pi, NUM_AZIMUTHS, endpoint=False) + rng.uniform(0, 0.006)
        elevation, azimuth = np.meshgrid(np.deg2rad(ELEVATIONS_DEG), azimuth, indexing="ij")
        surface_m = distance_m[(azimuth * len(distance_m) / (2 * np.pi)).astype(int) % len(distance_m)]
        ground_m = np.where(elevation < 0, -SENSOR_HEIGHT_M / np.tan(elevation), FAR_M)
        range_m = np.minimum(ground_m, surface_m) + rng.normal(0, 0.03, elevation.shape)
        hit = (range_m < 80) & (rng.random(elevation.shape) > 0.1)
        x = range_m * np.cos(azimuth) - EGO_STEP_M * sweep
        y = range_m * np.sin(azimuth)
        z = range_m * np.tan(elevation) + 0.3 * np.sin(x / 7) + rng.normal(0, 0.03, elevation.shape)
        drawn = (rng.uniform(0, top, x.shape) for top in tops)
        features = (x, y, z, *drawn, np.full(x.shape, 0.05 * sweep))
        sweeps.append(np.stack([f[hit] for f in features], axis=1))
    cloud: Cloud = np.concatenate(sweeps).astype(np.float32)
    return cloud


def _surface_distances(rng: np.random.Generator) -> NDArray[np.float64]:
    """Distance, metres, of the nearest upright surface in each of 180 directions."""
    distance_m: NDArray[np.float64] = np.repeat(rng.uniform(6, 50, 60), 3) + rng.normal(0, 0.5, 180)
    distance_m[np.repeat(rng.random(60) < 1 / 3, 3)] = FAR_M
    return distance_m
