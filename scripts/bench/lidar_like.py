"""Voxels to measure on: from a data set, or made up with the density of a nuScenes sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpq_train.data.clouds import batch_of_clouds, synthetic_cloud
from cpq_train.data.dataset import Batch, DetectionDataset, SampleConfig, collate
from cpq_train.data.index import open_index
from cpq_train.models import NetworkConfig

MAX_POINTS_PER_VOXEL = 10
MAX_NUM_VOXELS = 60000


def new_batch(
    config: NetworkConfig, num_sweeps: int, batch_size: int, root: Path | None, version: str
) -> Batch:
    """Samples of a data set, or where there is none, made-up scenes."""
    if root is None:
        return synthetic_batch(config, num_sweeps, batch_size)
    return load_batch(config, root, version, num_sweeps, batch_size)


def load_batch(config: NetworkConfig, root: Path, version: str, num_sweeps: int, batch_size: int) -> Batch:
    """The first samples of a data set, as validation loads them."""
    index = open_index(root, version)
    dataset = DetectionDataset(index, np.arange(len(index)), _sample_config(config, num_sweeps))
    return collate([dataset[i] for i in range(batch_size)])


def synthetic_batch(
    config: NetworkConfig,
    num_sweeps: int,
    batch_size: int,
    max_num_voxels: int = MAX_NUM_VOXELS,
    first_seed: int = 0,
) -> Batch:
    """Made-up scenes, of seeds that follow one another."""
    seeds = range(first_seed, first_seed + batch_size)
    clouds = [synthetic_cloud(num_sweeps, seed) for seed in seeds]
    names = [f"synthetic-{seed}" for seed in seeds]
    return batch_of_clouds(clouds, _sample_config(config, num_sweeps, max_num_voxels), names)


def _sample_config(
    config: NetworkConfig, num_sweeps: int, max_num_voxels: int = MAX_NUM_VOXELS
) -> SampleConfig:
    return SampleConfig(
        num_sweeps, config.voxel_size, config.point_cloud_range, MAX_POINTS_PER_VOXEL, max_num_voxels
    )
