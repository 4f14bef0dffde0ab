"""Bare cloud files: what the network gets of them, counted by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cpq_train.data.cloud_files import CloudFiles
from cpq_train.data.dataset import SampleConfig, collate
from cpq_train.data.sweeps import CloudError

CONFIG = SampleConfig(1, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 4.0, 4.0, 4.0), 10, 100)


def write(path: Path, points: list[list[float]]) -> Path:
    np.array(points, np.float32).tofile(path)
    return path


def test_voxels_of_two_files(tmp_path: Path) -> None:
    """Two points share a voxel, one lies alone, one outside; the ring number becomes a time lag of 0."""
    first = [[0.5, 1.5, 2.5, 10, 7], [0.7, 1.5, 2.5, 30, 7], [3.5, 0.5, 0.5, 5, 7], [9.0, 0, 0, 0, 7]]
    paths = [write(tmp_path / "a.bin", first), write(tmp_path / "b.bin", first[2:3])]
    files = CloudFiles(paths, CONFIG)
    batch = collate([files[position] for position in range(len(files))])
    found = {
        tuple(c): f for c, f in zip(batch["voxel_coords"].tolist(), batch["voxel_features"], strict=True)
    }
    assert found.keys() == {(0, 2, 1, 0), (0, 0, 0, 3), (1, 0, 0, 3)}  # file, z, y, x
    torch.testing.assert_close(found[0, 2, 1, 0], torch.tensor([0.6, 1.5, 2.5, 20.0, 0.0]))
    assert batch["sample_rows"].tolist() == [0, 1]
    assert batch["tokens"] == list(map(str, paths))


def test_files_are_looked_for_first(tmp_path: Path) -> None:
    with pytest.raises(CloudError, match=r"absent\.bin cannot be read: no such file"):
        CloudFiles([write(tmp_path / "a.bin", [[0.0] * 5]), tmp_path / "absent.bin"], CONFIG)
