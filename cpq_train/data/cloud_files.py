"""Bare cloud files as network input: no tables, no poses, no annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from cpq_train.data.clouds import cloud_item
from cpq_train.data.dataset import Item, SampleConfig, voxelizer_of
from cpq_train.data.sweeps import CloudError, read_cloud


class CloudFiles(Dataset[Item]):
    """Files of float32 x, y, z, intensity, ring, each a sample of one sweep.

    Points keep the file's order. `sample_row` is the position of the file, `token` its path.

    Args:
        paths: the files.
        config: sizes of the grid; the number of sweeps is not used.

    Raises:
        CloudError: a file does not exist.
    """

    def __init__(self, paths: Sequence[Path], config: SampleConfig) -> None:
        self.paths = list(paths)
        self._voxelizer = voxelizer_of(config)
        for path in self.paths:
            if not path.is_file():
                raise CloudError(f"cloud {path} cannot be read: no such file")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> Item:
        """Loads a file.

        Raises:
            CloudError: it is truncated or holds NaN or infinite values.
        """
        path = self.paths[position]
        return cloud_item(read_cloud(path), self._voxelizer, position, str(path))
