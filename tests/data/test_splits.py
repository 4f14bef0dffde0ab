"""Splits of a data set's own, unions of splits, and roots of which scenes are missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.utils.splits import get_scenes_of_split
from own_categories import CLASSES, SPLITS, own_categories
from own_categories import VERSION as FULL

from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.gt_database import build_gt_database, open_gt_database
from cpq_train.data.index import NuScenesIndex, open_index

VERSION = "v1.0-mini"
GRID = {"voxel_size": (0.64, 0.64, 0.32), "num_sweeps": 2, "num_workers": 0, "batch_size": 1}


@pytest.fixture(scope="module")
def own_root(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_categories(simulated_root, tmp_path_factory.mktemp("own") / "own")


def with_splits(root: Path, splits: object, version: str = FULL) -> NuScenesIndex:
    (root / version / "splits.json").write_text(json.dumps(splits))
    return open_index(root, version)


def scenes(index: NuScenesIndex, split: str) -> set[str]:
    return {index.scene_name(row) for row in index.sample_rows(split).tolist()}


def test_own_splits_are_those_of_the_devkit(own_root: Path) -> None:
    index, nusc = open_index(own_root, FULL), NuScenes(FULL, str(own_root), verbose=False)
    for name in SPLITS:
        assert scenes(index, name) == set(get_scenes_of_split(name, nusc)) == set(SPLITS[name])
    assert len(index.sample_rows("fahrten+pruefung")) == len(index)
    assert len(index.sample_rows("pruefung+pruefung")) == len(index.sample_rows("pruefung"))


def test_official_names_keep_their_meaning(root: Path, index: NuScenesIndex) -> None:
    official = scenes(index, "val")
    with pytest.raises(UserError, match="split 'mini_val' is an official one with 1 scenes here"):
        with_splits(root, {"mini_val": ["scene-0061"]}, VERSION).sample_rows("val")
    assert scenes(with_splits(root, {"mini_val": sorted(official)}, VERSION), "val") == official


def test_the_file_is_read_anew_and_the_index_kept(own_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(own_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    first = open_index(root, FULL)
    again = with_splits(root, {"neu": ["drive-4"]})
    assert again.folder == first.folder
    assert scenes(again, "neu") == {"drive-4"}
    with pytest.raises(UserError, match=r"split 'fahrten' holds no scene of .*there are neu \(1 scenes\)"):
        again.sample_rows("fahrten")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "splits.json"),
        ({"a": "drive-0"}, "a: got 'drive-0'"),
        ({"a": ["drive-0", "drive-0"]}, "split 'a' names scene 'drive-0' twice; accepted: each scene once"),
        (
            {"a": ["drive-0", "drive-9"]},
            "split 'a' names 1 scenes that table scene has not, such as 'drive-9'",
        ),
        ({"a+b": ["drive-0"]}, "'a.b'; accepted: a name without"),
        ({"a": []}, "split 'a' holds no scene of .*: the splits with scenes there are none"),
    ],
)
def test_wrong_files(own_root: Path, tmp_path: Path, splits: object, message: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(own_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    index = with_splits(root, splits)
    with pytest.raises(UserError, match=message):
        index.sample_rows("a")


def test_no_file_names_the_way(own_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(own_root, root, ignore=shutil.ignore_patterns(".cpq_train", "splits.json"))
    with pytest.raises(
        UserError, match=r"none, its scene names are not official ones; splits.json beside the tables"
    ):
        open_index(root, FULL).sample_rows("train")


@pytest.fixture
def make(simulated_root: Path) -> Callable[..., NuScenesDataModule]:
    return lambda **options: NuScenesDataModule(str(simulated_root), **{**GRID, **options})


def test_what_is_trained_and_scored_is_found_whatever_splits_are_called(
    make: Callable[..., NuScenesDataModule], own_root: Path, tmp_path: Path
) -> None:
    data = make(train_splits=["train", "val"])
    assert len(data.selection.train_rows) == 10
    assert data.selection.trained_and_scored == "train+val"
    assert make().selection.trained_and_scored is None
    assert make(train_split="val").selection.trained_and_scored == "val"
    root = tmp_path / "copy"
    shutil.copytree(own_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    with_splits(root, {"everything": ["drive-0", "drive-4"], "checked": ["drive-4"]})
    own = NuScenesDataModule(str(root), FULL, train_split="everything", val_split="checked", **GRID)
    assert own.selection.trained_and_scored == "everything"


def test_a_network_is_not_scored_on_what_it_was_trained_on(make: Callable[..., NuScenesDataModule]) -> None:
    data = make()
    data.selection.check_unseen(None, "the network was trained on")
    data.selection.check_unseen("train", "the network was trained on")
    with pytest.raises(
        UserError, match=r"trained on 'train\+val' holds 4 of the 4 samples of data.val_split"
    ):
        data.selection.check_unseen("train+val", "the network was trained on")
    make(force_score_on_train=True).selection.check_unseen("train+val", "the network was trained on")


def test_a_union_calibrates_on_what_is_not_scored(make: Callable[..., NuScenesDataModule]) -> None:
    data = make(train_splits=["val", "train"], num_calibration_samples=6)
    np.testing.assert_array_equal(np.sort(data.calibration_rows), make().selection.train_rows)
    on_val = make(train_splits=["train", "val"], calibration_split="train+val", num_calibration_samples=10)
    with pytest.raises(UserError, match=r"4 of the 10 samples belong to data.val_split 'val'"):
        _ = on_val.calibration_rows


@pytest.mark.parametrize(
    "options", [{"train_splits": []}, {"train_splits": ["val"], "train_split": "mini_train"}]
)
def test_one_way_to_name_what_is_trained_on(
    make: Callable[..., NuScenesDataModule], options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="accepted: one split or more, and no train_split beside them"):
        make(**options)


def without_a_sweep(source: Path, root: Path, scene: str) -> Path:
    """A copy that lacks one sweep, not a key frame, of a scene."""
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".cpq_train"))
    index = open_index(root, FULL)
    frames = [
        int(index.frame_previous[index.sample_frames[r]])
        for r in range(len(index))
        if index.scene_name(r) == scene
    ]
    frame = next(frame for frame in frames if frame >= 0)
    (root / str(index.frame_paths[frame], "utf-8")).unlink()
    return root


def test_scenes_without_a_file_are_skipped_and_said(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = NuScenesDataModule(str(simulated_root), **GRID)
    name = whole.index.scene_name(int(whole.eval_rows[0]))
    root = without_a_sweep(simulated_root, tmp_path / "part", name)
    data = NuScenesDataModule(str(root), missing_scenes="skip", **GRID)
    assert {data.index.scene_name(row) for row in data.eval_rows.tolist()} == {
        whole.index.scene_name(row) for row in whole.eval_rows.tolist()
    } - {name}
    assert len(data.selection.train_rows) == len(whole.selection.train_rows)
    assert data.scored_info()["skipped_scenes"] == [name]
    assert "skipped_scenes" not in whole.scored_info()
    said = capsys.readouterr()
    assert (said.out + said.err).count("split val: 1 of 2 scenes are skipped") == 1
    key_frame_alone = NuScenesDataModule(str(root), missing_scenes="skip", **{**GRID, "num_sweeps": 1})
    assert len(key_frame_alone.eval_rows) == len(whole.eval_rows)


def test_a_root_without_clouds(simulated_root: Path, tmp_path: Path) -> None:
    shutil.copytree(simulated_root / FULL, tmp_path / "root" / FULL)
    data = NuScenesDataModule(str(tmp_path / "root"), missing_scenes="skip", **GRID)
    with pytest.raises(UserError, match="files of all 2 scenes of split 'val' are missing"):
        _ = data.eval_rows


def test_databases_of_splits_of_one_name_are_told_apart(own_root: Path, tmp_path: Path) -> None:
    from cpq_train.common.detection_task import DetectionClass, DetectionTask

    root = tmp_path / "copy"
    shutil.copytree(own_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    classes = {name: DetectionClass(**rules) for name, rules in CLASSES.items()}
    task = DetectionTask.of(classes)
    build_gt_database(root, FULL, "fahrten", num_sweeps=1, num_workers=0, classes=classes)
    first = open_gt_database(open_index(root, FULL, None, task), "fahrten", 1)
    assert set(first.classes.tolist()) <= {0, 1, 2}
    (root / FULL / "splits.json").write_text(json.dumps({"fahrten": ["drive-0"], "pruefung": ["drive-4"]}))
    with pytest.raises(UserError, match=r"build-gt-database .* --classes '\{\"person\""):
        open_gt_database(open_index(root, FULL, None, task), "fahrten", 1)
