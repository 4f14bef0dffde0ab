"""Clouds that cannot be used: by default an error, within a share left out, counted and named."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpq_train.common.errors import UserError
from cpq_train.data.bad_sweeps import BadSweepLimit
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import collate, points_of
from cpq_train.data.sweeps import CloudError, load_sweeps, previous_frames

NUM_SWEEPS = 3


@pytest.fixture
def own_root(simulated_root: Path, tmp_path: Path) -> Path:
    """A copy to damage, without an index."""
    root = tmp_path / "root"
    shutil.copytree(simulated_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    return root


def data_of(root: Path, max_bad_sweeps: float = 0.3, **settings: Any) -> NuScenesDataModule:
    settings = {"num_sweeps": NUM_SWEEPS, "num_workers": 0, "batch_size": 2, "augmentation": None} | settings
    return NuScenesDataModule(str(root), max_bad_sweeps=max_bad_sweeps, **settings)


def key_frame(data: NuScenesDataModule, row: int) -> Path:
    return data.index.frame_path(int(data.index.sample_frames[row]))


def past_frame(data: NuScenesDataModule, row: int) -> Path:
    return data.index.frame_path(previous_frames(data.index, row, NUM_SWEEPS)[1])


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        points = np.fromfile(path, np.float32)
        points[7] = np.nan
        points.tofile(path)


WAYS = ("missing", "truncated", "empty", "nan")


@pytest.mark.parametrize("how", WAYS)
def test_a_bad_past_sweep_is_left_out_and_named(
    own_root: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    data = data_of(own_root)
    row = int(data.eval_rows[1])
    whole = load_sweeps(data.index, row, NUM_SWEEPS)
    frames = previous_frames(data.index, row, NUM_SWEEPS)
    lags = np.unique(whole[:, 4])
    path = past_frame(data, row)
    spoil(path, how)
    with pytest.raises(
        CloudError, match=re.escape(f"cloud {path} of sample {data.index.sample_token(row)} ")
    ):
        _ = data_of(own_root, 0.0)._samples(data.eval_rows)[1]
    item = data._samples(data.eval_rows)[1]
    (note,) = item["bad_sweeps"]
    assert note.startswith(f"cloud {path} of sample {data.index.sample_token(row)} ")
    bad: dict[int, str] = {}
    left = load_sweeps(data.index, row, NUM_SWEEPS, bad=bad)
    np.testing.assert_array_equal(left, whole[whole[:, 4] != lags[2]])
    assert bad == {frames[1]: note}
    batches = list(data.evaluation_dataloader())
    assert all("bad_sweeps" not in batch for batch in batches)
    assert data.num_bad_sweeps == 1
    assert capsys.readouterr().err.count(f"left out: {note}") == 1


def test_a_bad_key_frame_in_evaluation_leaves_the_other_sweeps(own_root: Path) -> None:
    data = data_of(own_root)
    row = int(data.eval_rows[1])
    whole = load_sweeps(data.index, row, NUM_SWEEPS)
    spoil(key_frame(data, row), "truncated")
    found = points_of(data.index, row, data.evaluation_config)
    np.testing.assert_array_equal(found, whole[whole[:, 4] > 0])
    with pytest.raises(CloudError):
        points_of(data.index, row, data_of(own_root, 0.0).evaluation_config)


def test_a_sample_of_which_nothing_is_left_is_empty(own_root: Path) -> None:
    data = data_of(own_root, 0.9)
    row = int(data.eval_rows[1])
    for frame in {int(data.index.sample_frames[row]), *previous_frames(data.index, row, NUM_SWEEPS)}:
        spoil(data.index.frame_path(frame), "empty")
    item = data._samples(data.eval_rows)[1]
    assert item["voxel_features"].shape == (0, 5)
    assert len(item["bad_sweeps"]) == NUM_SWEEPS
    assert len(item["gt_boxes"])


def test_a_bad_key_frame_in_training_gives_way_to_another_sample(own_root: Path) -> None:
    data = data_of(own_root)
    rows = data.selection.train_rows
    before = {item["token"]: item for item in _epoch(data)}
    assert sorted(before) == sorted(data.index.sample_token(row) for row in rows)
    gone = data.index.sample_token(rows[2])
    spoil(key_frame(data, int(rows[2])), "nan")
    tokens = [item["token"] for item in _epoch(data)]
    assert gone not in tokens
    assert len(tokens) == len(rows)
    assert tokens == [item["token"] for item in _epoch(data_of(own_root, num_workers=2))]


def _epoch(data: NuScenesDataModule) -> Iterator[dict[str, Any]]:
    for batch in data.train_dataloader():
        for number, token in enumerate(batch["tokens"]):
            rows = batch["voxel_coords"][:, 0] == number
            yield {"token": token, "voxel_features": batch["voxel_features"][rows]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_stop_the_run(own_root: Path, num_workers: int) -> None:
    """Two validation scenes of two samples: of twelve sweeps two are a share of 0.17."""
    rows = data_of(own_root).eval_rows
    spoil(past_frame(data_of(own_root), int(rows[1])), "truncated")
    spoil(past_frame(data_of(own_root), int(rows[3])), "missing")
    enough = data_of(own_root, 0.17, num_workers=num_workers)
    assert sum(batch["batch_size"] for batch in enough.evaluation_dataloader()) == 4
    assert enough.num_bad_sweeps == 2
    few = data_of(own_root, 0.1, num_workers=num_workers)
    words = "2 of the 12 sweeps of an epoch cannot be used: data.max_bad_sweeps 0.1 accepts 1"
    with pytest.raises(CloudError, match=re.escape(words)):
        list(few.evaluation_dataloader())
    assert few.num_bad_sweeps == 2
    none = data_of(own_root, 0.0, num_workers=num_workers)
    with pytest.raises(CloudError, match="truncated"):
        list(none.evaluation_dataloader())


def test_every_epoch_and_rank_counts_for_itself(own_root: Path) -> None:
    data = data_of(own_root, 0.4)
    rows = data.eval_rows
    spoil(past_frame(data, int(rows[1])), "truncated")
    spoil(past_frame(data, int(rows[3])), "truncated")
    loader = data.evaluation_dataloader()
    for _ in range(2):
        list(loader)
        assert data.num_bad_sweeps == 2
    list(data.evaluation_dataloader(0, 2))
    assert data.num_bad_sweeps == 0
    list(data.evaluation_dataloader(1, 2))
    assert data.num_bad_sweeps == 2


def test_calibration_leaves_bad_sweeps_out_within_the_same_share(
    own_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(own_root, num_calibration_samples=2)
    spoil(past_frame(data, int(data.calibration_rows[0])), "nan")
    assert [batch["batch_size"] for batch in data.calibration_dataloader()] == [2]
    assert "left out: cloud" in capsys.readouterr().err
    with pytest.raises(CloudError, match=r"1 of the 6 sweeps .* accepts 0"):
        list(data_of(own_root, 0.1, num_calibration_samples=2).calibration_dataloader())


def test_where_no_key_frame_is_left_training_says_so(own_root: Path) -> None:
    data = data_of(own_root, 0.9)
    for row in data.selection.train_rows.tolist():
        spoil(key_frame(data, row), "empty")
    with pytest.raises(
        CloudError, match=r"draws found no sample to train on; the first left out: cloud .*empty"
    ):
        list(data.train_dataloader())


def test_the_default_loads_as_before_and_adds_no_key(simulated_root: Path) -> None:
    usual, tolerant = data_of(simulated_root, 0.0), data_of(simulated_root, 0.5)
    for name in ("train_dataloader", "evaluation_dataloader"):
        one, two = (next(iter(getattr(data, name)())) for data in (usual, tolerant))
        assert one.keys() == two.keys() == collate([usual._samples(usual.eval_rows)[0]]).keys()
        assert one["tokens"] == two["tokens"]
        assert torch.equal(one["voxel_features"], two["voxel_features"])
    assert usual.evaluation_dataloader().limit is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.max_bad_sweeps is .*: expected 0 to less than 1"):
        NuScenesDataModule(max_bad_sweeps=share)


def test_a_limit_counts_what_it_hands_on() -> None:
    told: list[int] = []
    limit = BadSweepLimit(0.2, 10, told.append)
    batches = [{"a": 1}, {"bad_sweeps": ["x"]}, {"b": 2}, {"bad_sweeps": ["y"]}, {"bad_sweeps": ["z"]}]
    with pytest.raises(CloudError, match="3 of the 10"):
        list(limit.watch(iter(batches)))
    assert told == [0, 1, 2, 3]
    assert batches[1] == {}
