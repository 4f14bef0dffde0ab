"""Voxels to measure on: from a data set, or made up with the density of a nuScenes sample.

Letters: P points, V voxels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.dataset import Batch, DetectionDataset, SampleConfig, collate
from cpq_train.data.index import open_index
from cpq_train.data.voxelization import Voxelizer
from cpq_train.models import NetworkConfig

MAX_POINTS_PER_VOXEL = 10
MAX_NUM_VOXELS = 60000
SENSOR_HEIGHT_M = 1.84
ELEVATIONS_DEG = np.linspace(-30.67, 10.67, 32)
NUM_AZIMUTHS = 1085
FAR_M = 1000.0
"""Farther than any return."""
EGO_STEP_M = 0.4
"""Driven between two sweeps: 8 m/s at 20 Hz."""


def load_batch(config: NetworkConfig, root: Path, version: str, num_sweeps: int, batch_size: int) -> Batch:
    """The first samples of a data set, as validation loads them."""
    index = open_index(root, version)
    sample = SampleConfig(
        num_sweeps, config.voxel_size, config.point_cloud_range, MAX_POINTS_PER_VOXEL, MAX_NUM_VOXELS
    )
    dataset = DetectionDataset(index, np.arange(len(index)), sample)
    return collate([dataset[i] for i in range(batch_size)])


def synthetic_batch(config: NetworkConfig, num_sweeps: int, batch_size: int) -> Batch:
    """Made-up scenes: 32 rings on rolling ground, with upright surfaces in two thirds of all directions."""
    voxelizer = Voxelizer(config.voxel_size, config.point_cloud_range, MAX_POINTS_PER_VOXEL, MAX_NUM_VOXELS)
    items = []
    for seed in range(batch_size):
        features, cells, _ = voxelizer(_points(num_sweeps, np.random.default_rng(seed)))
        no_boxes = features.new_zeros((0, 10))
        items.append(
            {
                "voxel_features": features,
                "voxel_coords": cells,
                "gt_boxes": no_boxes,
                "sample_row": seed,
                "token": f"synthetic-{seed}",
            }
        )
    return collate(items)  # type: ignore[arg-type]  # literal dictionaries of the right shape


def _points(num_sweeps: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(P, 5) points of a static scene from a car that drives along x."""
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
        features = (x, y, z, rng.uniform(0, 100, x.shape), np.full(x.shape, 0.05 * sweep))
        sweeps.append(np.stack([f[hit] for f in features], axis=1))
    points: NDArray[np.float32] = np.concatenate(sweeps).astype(np.float32)
    return points


def _surface_distances(rng: np.random.Generator) -> NDArray[np.float64]:
    """Distance, metres, of the nearest upright surface in each of 180 directions."""
    distance_m: NDArray[np.float64] = np.repeat(rng.uniform(6, 50, 60), 3) + rng.normal(0, 0.5, 180)
    distance_m[np.repeat(rng.random(60) < 1 / 3, 3)] = FAR_M
    return distance_m
