import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.sweeps import (
    CloudError,
    load_cloud,
    load_sweeps,
    previous_frames,
    sweep_transform,
    time_lag_s,
)

SAMPLES = [(split, i) for split in ("train", "val") for i in range(4)]


@pytest.mark.parametrize(("split", "i"), SAMPLES)
def test_frames_equal_golden_infos(index: NuScenesIndex, golden_dir: Path, split: str, i: int) -> None:
    matrices = np.load(golden_dir / "golden_infos.npz")[f"{split}{i}_sweep_tm"]
    sweeps = json.loads((golden_dir / "golden_infos.json").read_text())[f"{split}{i}"]["sweeps"]
    row = int(index.sample_rows(split)[i])
    frames = previous_frames(index, row, 10)
    assert len(frames) == len(sweeps) == 9
    for frame, sweep, matrix in zip(frames, sweeps, matrices, strict=True):
        assert index.frame_path(frame) == index.root / sweep["lidar_path"]
        assert time_lag_s(index, row, frame) == sweep["time_lag"]
        np.testing.assert_allclose(sweep_transform(index, row, frame), matrix, atol=1e-9, rtol=0)


@pytest.mark.parametrize("i", range(4))
def test_points_equal_golden(index: NuScenesIndex, golden_dir: Path, i: int) -> None:
    golden = np.load(golden_dir / "golden_infos.npz")[f"val{i}_points_10sweeps_sorted"]
    points = load_sweeps(index, int(index.sample_rows("val")[i]), 10)
    assert points.dtype == np.float32
    ordered = points[np.lexsort(points.T[::-1])]
    np.testing.assert_allclose(ordered, golden, atol=1e-5, rtol=0)


def test_fewer_sweeps_are_the_newest(index: NuScenesIndex) -> None:
    row = int(index.sample_rows("val")[1])
    whole = load_sweeps(index, row, 10)
    for num_sweeps in range(1, 10):
        points = load_sweeps(index, row, num_sweeps)
        np.testing.assert_array_equal(points, whole[: len(points)])
        assert len(np.unique(points[:, 4])) == num_sweeps
    assert len(load_sweeps(index, row, 1)) == 60


def test_scene_start_repeats_the_oldest_sweep(index: NuScenesIndex) -> None:
    row = int(index.sample_rows("train")[0])  # four sweeps lie before it
    frames = previous_frames(index, row, 10)
    assert len(set(frames)) == 4
    assert frames[4:] == [frames[3]] * 5
    points = load_sweeps(index, row, 10)
    lags, counts = np.unique(points[:, 4], return_counts=True)
    assert len(lags) == 5
    assert counts[-1] % 6 == 0


def test_first_frame_of_a_scene_repeats_itself(real_index: NuScenesIndex, real_tokens: list[str]) -> None:
    row = int(real_index.sample_rows("val", real_tokens[:1])[0])
    once, thrice = load_sweeps(real_index, row, 1), load_sweeps(real_index, row, 3)
    is_ego = (np.abs(once[:, 0]) < 1) & (np.abs(once[:, 1]) < 1)
    assert 0 < is_ego.sum() < len(once) / 2
    np.testing.assert_array_equal(thrice, np.concatenate([once, once[~is_ego], once[~is_ego]]))
    assert not thrice[:, 4].any()


def test_real_clouds_align_when_ego_motion_is_compensated(real_index: NuScenesIndex) -> None:
    row = int(real_index.sample_rows("val", ["3950bd41f74548429c0f7700ff3d8269"])[0])
    frames = previous_frames(real_index, row, 11)
    raw, moved = [], []
    for frame in (frames[0], frames[9]):
        points = load_cloud(real_index, frame, row)[:, :3]
        is_ego = (np.abs(points[:, :2]) < 1).all(axis=1)
        points = points[~is_ego & (points[:, 2] > -1.2)]  # the ground lies at -1.84 m
        matrix = sweep_transform(real_index, row, frame)
        raw.append(points)
        moved.append(points @ matrix[:3, :3].T + matrix[:3, 3])
    before, after = (np.median(cKDTree(new).query(old)[0]) for new, old in (raw, moved))
    assert before > 0.5
    assert after < 0.6 * before
    assert after < 0.3


def damaged(root: Path, change: str) -> tuple[Path, int, NuScenesIndex]:
    """Damages the second newest sweep of a sample."""
    index = open_index(root, "v1.0-mini")
    row = int(index.sample_rows("val")[2])
    path = index.frame_path(previous_frames(index, row, 3)[1])
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif change == "empty":
        path.write_bytes(b"")
    else:
        points[17, 2] = float(change)
        points.tofile(path)
    return path, row, index


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "cannot be read: No such file or directory"),
        ("truncated", "is truncated: 1193 bytes, expected a multiple of 20"),
        ("empty", "is empty: 0 bytes"),
        ("nan", "holds NaN or infinite values in 1 of 60 points, first in point 17"),
        ("inf", "holds NaN or infinite values in 1 of 60 points, first in point 17"),
    ],
)
def test_bad_cloud_names_file_and_sample(root: Path, change: str, words: str) -> None:
    path, row, index = damaged(root, change)
    expected = f"cloud {path} of sample {index.sample_token(row)} {words}"
    with pytest.raises(CloudError, match=re.escape(expected)):
        load_sweeps(index, row, 3)
    assert len(load_sweeps(index, row, 2))  # which does not reach the bad one
