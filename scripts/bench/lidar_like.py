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


def load_batch(config: NetworkConfig, root: Path, version: str, num_sweeps: int, batch_size: int) -> Batch:
    """The first samples of a data set, as validation loads them."""
    index = open_index(root, version)
    dataset = DetectionDataset(index, np.arange(len(index)), _sample_config(config, num_sweeps))
    return collate([dataset[i] for i in range(batch_size)])


def synthetic_batch(config: NetworkConfig, num_sweeps: int, batch_size: int) -> Batch:
    """Made-up scenes."""
    clouds = [synthetic_cloud(num_sweeps, seed) for seed in range(batch_size)]
    names = [f"synthetic-{seed}" for seed in range(batch_size)]
    return batch_of_clouds(clouds, _sample_config(config, num_sweeps), names)


def _sample_config(config: NetworkConfig, num_sweeps: int) -> SampleConfig:
    return SampleConfig(
        num_sweeps, config.voxel_size, config.point_cloud_range, MAX_POINTS_PER_VOXEL, MAX_NUM_VOXELS
    )
