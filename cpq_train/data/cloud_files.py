"""Bare cloud files as network input: no tables, no poses, no annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from cpq_train.data.clouds import Cloud, cloud_item
from cpq_train.data.dataset import Item, SampleConfig, voxelizer_of
from cpq_train.data.points.checks import check_cloud
from cpq_train.data.points.files import CloudError
from cpq_train.data.sweeps import read_cloud


class CloudFiles(Dataset[Item]):
    """Files of points, each a sample of one sweep.

    Points keep the file's order. `sample_row` is the position of the file, `token` its path.

    Args:
        paths: the files.
        config: sizes of the grid, and how points lie in the files; the number of sweeps is not used.

    Raises:
        CloudError: a file does not exist.
    """

    def __init__(self, paths: Sequence[Path], config: SampleConfig) -> None:
        self.paths = list(paths)
        self.config = replace(config, num_sweeps=1)
        self._voxelizer = voxelizer_of(config)
        for path in self.paths:
            if not path.is_file():
                raise CloudError(f"cloud {path} cannot be read: no such file")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> Item:
        """Loads a file.

        Raises:
            CloudError: it is truncated, holds NaN or infinite values, or is not of the columns that it is
                read by.
        """
        path, notes = self.paths[position], list[str]()
        check_cloud(path, self.config.points, self.config.skips_bad_sweeps)
        points = points_of_file(path, self.config, notes)
        item = cloud_item(points, self._voxelizer, position, str(path))
        if notes:
            item["bad_sweeps"] = notes
        return item


def points_of_file(path: Path, config: SampleConfig, notes: list[str] | None = None) -> Cloud:
    """The points (P, F) of a file as it is predicted on.

    Args:
        path: the file.
        config: how points lie in it; none are there where it cannot be used and that is accepted.
        notes: gets what is wrong then.

    Raises:
        CloudError: it cannot be used.
    """
    try:
        return read_cloud(path, points=config.points)
    except CloudError as error:
        if not config.skips_bad_sweeps:
            raise
        if notes is not None:
            notes.append(str(error))
        return np.empty((0, len(config.points.features)), dtype=np.float32)
