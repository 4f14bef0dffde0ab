"""Clouds that cannot be used: by default an error, within a share left out, counted and named."""

import dataclasses
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_roots import FOUR, rewritten, write_bin, write_npy, write_pcd

from cpq_train.common.errors import UserError
from cpq_train.data import data_set
from cpq_train.data.bad_sweeps import BadSweepLimit
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import MAX_BAD_DRAWS, DetectionDataset, collate, points_of
from cpq_train.data.gt_database import GtDatabase, build_gt_database, open_gt_database
from cpq_train.data.gt_sampling import GtSampling
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.points.checks import check_cloud
from cpq_train.data.sweeps import CloudError, load_sweeps, previous_frames, time_lag_s

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
    words = "2 of the 12 sweeps cannot be used: data.max_bad_sweeps 0.1 accepts 1"
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
        CloudError,
        match=r"no sample to train on: 6 that were drawn have a key frame that cannot be used; the first "
        "left out: cloud .*empty",
    ):
        list(data.train_dataloader())


def test_draws_that_find_no_key_frame_end_soon(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 600 samples: each draw reads the sweeps of a sample, for nothing."""
    data, drawn = data_of(own_root, 0.9), list[int]()
    rows = np.repeat(data.selection.train_rows, 100)
    for row in np.unique(rows).tolist():
        spoil(key_frame(data, row), "truncated")

    def counted(index: NuScenesIndex, row: int, *rest: Any) -> np.ndarray:
        drawn.append(row)
        return load_sweeps(index, row, *rest)

    monkeypatch.setattr("cpq_train.data.dataset.load_sweeps", counted)
    config = dataclasses.replace(data.evaluation_config, is_training=True)
    first = re.escape(str(key_frame(data, int(rows[7]))))
    with pytest.raises(CloudError, match=rf"{MAX_BAD_DRAWS} that were drawn .* left out: cloud {first} "):
        _ = DetectionDataset(data.index, rows, config)[7]
    assert len(drawn) == MAX_BAD_DRAWS == 20


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


def test_a_share_of_whole_sweeps_is_taken_as_it_is_written() -> None:
    """0.29 * 100 is 28.999999999999996."""
    for number, accepted in ((29, True), (30, False)):
        batches = iter([{"bad_sweeps": ["x"] * number}])
        with nullcontext() if accepted else pytest.raises(CloudError, match=r"30 of the 100 .* accepts 29"):
            list(BadSweepLimit(0.29, 100).watch(batches))


@pytest.mark.parametrize("ending", [".npy", ".pcd", ".bin"])
def test_files_that_are_all_of_other_columns_are_no_bad_sweeps(
    simulated_root: Path, tmp_path: Path, ending: str
) -> None:
    write = {".npy": write_npy, ".pcd": write_pcd, ".bin": write_bin}[ending]
    root = rewritten(
        simulated_root, tmp_path / "own", FOUR, ending, write, lambda p: p[: len(p) // 5 * 5 - 1]
    )
    words = {
        ".npy": r"\.npy has 4 columns; data\.point_columns is \[x, y, z, intensity, ring\]: expected",
        ".pcd": r"\.pcd has \[x, y, z, intensity\]; data\.point_columns is",
        ".bin": r"\.bin is truncated: \d+ bytes, expected a multiple of 20, or has other columns",
    }[ending]
    with pytest.raises(CloudError, match=words):
        data_of(root, 0.5).prepare_data()
    with pytest.raises(CloudError, match=words):
        build_gt_database(root, num_workers=0, max_bad_sweeps=0.5)
    data_of(root, 0.5, point_columns=FOUR).prepare_data()


@pytest.mark.parametrize("how", ["truncated", "empty", "nan"])
def test_single_bad_files_are_passed_over_when_a_data_set_is_opened(
    own_root: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    seen: list[Path] = []

    def noted(path: Path, *rest: Any) -> CloudError | None:
        seen.append(path)
        return check_cloud(path, *rest)

    monkeypatch.setattr("cpq_train.data.points.checks.check_cloud", noted)
    data_of(own_root).prepare_data()
    looked_at = [*seen]
    assert len(looked_at) == 3
    for path in looked_at[:2]:
        spoil(path, how) if how != "nan" else np.full((1000, 5), np.nan, np.float32).tofile(path)
        data_of(own_root).prepare_data()
        with pytest.raises(CloudError, match=how if how != "nan" else "NaN"):
            data_of(own_root, 0.0).prepare_data()
    spoil(looked_at[2], "empty")
    with pytest.raises(CloudError, match=re.escape(str(looked_at[0]))):
        data_of(own_root).prepare_data()


def test_a_data_set_is_opened_once(simulated_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for name in ("open_index", "check_files"):
        whole = getattr(data_set, name)
        monkeypatch.setattr(data_set, name, lambda *a, w=whole, n=name: (opened.append(n), w(*a))[1])
    data = data_of(simulated_root)
    data.prepare_data()
    data.setup("fit")
    _ = data.index, data.eval_rows
    data.prepare_data()
    assert opened == ["open_index", "check_files"]


def _database(root: Path, cache: Path, **options: Any) -> GtDatabase:
    settings = {"num_sweeps": NUM_SWEEPS, "num_workers": 0, "cache_dir": cache}
    build_gt_database(root, **settings | options)
    index = open_index(root, "v1.0-trainval", cache)
    return open_gt_database(index, "train", NUM_SWEEPS, cache, max_bad_sweeps=0.5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gt_database_does_without_bad_sweeps(
    own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    """Six samples of three sweeps: two bad ones are a share of 0.12."""
    data = data_of(own_root)
    whole = _database(own_root, tmp_path / "whole")
    past, gone = data.selection.train_rows[[1, 4]].tolist()
    spoil(past_frame(data, past), "nan")
    spoil(key_frame(data, gone), "truncated")
    with pytest.raises(CloudError, match=r"NaN|truncated"):
        _database(own_root, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    options = {"max_bad_sweeps": 0.12, "num_workers": num_workers}
    found = _database(own_root, tmp_path / "cache", **options)
    said = capsys.readouterr().err
    assert said.count("left out: cloud ") == 2
    for path, row in ((past_frame(data, past), past), (key_frame(data, gone), gone)):
        assert f"left out: cloud {path} of sample {data.index.sample_token(row)} " in said
    assert found.folder.name == whole.folder.name
    assert (whole.sample_rows == gone).any()
    kept = np.flatnonzero(whole.sample_rows != gone)
    np.testing.assert_array_equal(found.tokens, whole.tokens[kept])
    for row, before in enumerate(kept.tolist()):
        points, all_points = found.points_of(row), whole.points_of(before)
        if found.sample_rows[row] == past:
            lag = time_lag_s(data.index, past, previous_frames(data.index, past, NUM_SWEEPS)[1])
            all_points = all_points[all_points[:, 4] != np.float32(lag)]
        np.testing.assert_array_equal(points, all_points)


def test_bad_sweeps_of_scenes_that_are_there_already_count_too(
    own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(own_root)
    for row in data.selection.train_rows[[1, 4]].tolist():
        spoil(past_frame(data, row), "empty")
    for _ in range(2):  # the second build finds scenes of the first
        with pytest.raises(
            CloudError, match=r"2 of the 18 sweeps cannot be used: data\.max_bad_sweeps 0\.1 accepts 1"
        ):
            _database(own_root, tmp_path / "cache", max_bad_sweeps=0.1)
        assert capsys.readouterr().err.count("left out: cloud") == 2
    with pytest.raises(CloudError, match=r"1 of the 18 sweeps .*max_bad_sweeps 0 accepts 0"):
        _database(own_root, tmp_path / "cache")
    assert "scenes are there already" in capsys.readouterr().err
    assert len(_database(own_root, tmp_path / "cache", max_bad_sweeps=0.12))
    assert capsys.readouterr().err.count("left out: cloud") == 2


def test_the_command_that_builds_a_gt_database_accepts_as_many(own_root: Path, tmp_path: Path) -> None:
    gt = GtSampling(targets={"car": 2})
    data = data_of(own_root, 0.12, gt_sampling=gt, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"build-gt-database .* --max_bad_sweeps 0\.12$"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"data\.max_bad_sweeps is 1: expected 0 to less than 1"):
        build_gt_database(own_root, max_bad_sweeps=1)
