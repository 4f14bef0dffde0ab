import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import ATTRIBUTES, DETECTION_CLASSES
from cpq_train.data import derived
from cpq_train.data import index as index_module
from cpq_train.data.boxes import invert_poses
from cpq_train.data.index import COLUMNS, NuScenesIndex, open_index


def names_of(classes: np.ndarray) -> list[str]:
    return ["ignore" if c < 0 else DETECTION_CLASSES[c] for c in classes]


@pytest.mark.parametrize("split", ["train", "val"])
def test_samples_equal_golden_infos(index: NuScenesIndex, golden_dir: Path, split: str) -> None:
    arrays = np.load(golden_dir / "golden_infos.npz")
    infos = json.loads((golden_dir / "golden_infos.json").read_text())
    rows = index.sample_rows(split)
    assert len(rows) == 4
    for i, row in enumerate(rows):
        info = infos[f"{split}{i}"]
        where = index.annotations(row)
        is_kept = index.annotation_num_lidar_pts[where] + index.annotation_num_radar_pts[where] > 0
        assert index.sample_token(row) == info["token"]
        assert 1e-6 * index.sample_times_us[row] == pytest.approx(info["timestamp"], abs=1e-7)
        assert str(index.frame_paths[index.sample_frames[row]], "utf-8") == info["lidar_path"]
        assert names_of(index.annotation_classes[where][is_kept]) == info["gt_names"]
        assert [str(t, "utf-8") for t in index.annotation_tokens[where][is_kept]] == info["gt_boxes_token"]
        boxes = index.annotation_boxes[where][is_kept]
        np.testing.assert_allclose(boxes, arrays[f"{split}{i}_gt_boxes"], atol=1e-9, rtol=0)
        for name in ("num_lidar_pts", "num_radar_pts"):
            column = getattr(index, f"annotation_{name}")[where][is_kept]
            np.testing.assert_array_equal(column, arrays[f"{split}{i}_{name}"])
        for name, pose in (("ref_from_car", "lidar_to_ego"), ("car_from_global", "ego_to_global")):
            inverse = invert_poses(getattr(index, f"sample_{pose}")[row])
            np.testing.assert_allclose(inverse, arrays[f"{split}{i}_{name}"], atol=1e-9, rtol=0)


def test_real_columns_equal_the_devkit(real_index: NuScenesIndex) -> None:
    from nuscenes import NuScenes
    from pyquaternion import Quaternion

    nusc = NuScenes("v1.0-mini", str(real_index.root), verbose=False)
    assert len(real_index) == len(nusc.sample) == 81
    assert len(real_index.annotation_tokens) == len(nusc.sample_annotation) == 4514
    for row in range(0, 81, 4):
        token = real_index.sample_token(row)
        sample = nusc.get("sample", token)
        where = real_index.annotations(row)
        assert [str(t, "utf-8") for t in real_index.annotation_tokens[where]] == sample["anns"]
        _, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        lidar = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        ego = nusc.get("ego_pose", lidar["ego_pose_token"])
        sensor = nusc.get("calibrated_sensor", lidar["calibrated_sensor_token"])
        assert real_index.sample_ego_translations[row].tolist() == ego["translation"]
        assert real_index.sample_ego_rotations[row].tolist() == ego["rotation"]
        assert real_index.sample_lidar_rotations[row].tolist() == sensor["rotation"]
        to_lidar = (Quaternion(ego["rotation"]) * Quaternion(sensor["rotation"])).inverse
        for box, a in zip(boxes, range(where.start, where.stop), strict=True):
            annotation = nusc.get("sample_annotation", box.token)
            attributes = [nusc.get("attribute", t)["name"] for t in annotation["attribute_tokens"]]
            velocity = nusc.box_velocity(box.token)
            forward = box.orientation.rotate([1.0, 0.0, 0.0])
            moved = [*box.center, *box.wlh[[1, 0, 2]], np.arctan2(forward[1], forward[0])]
            moved += to_lidar.rotate(velocity)[:2].tolist()
            np.testing.assert_allclose(real_index.annotation_boxes[a], moved, atol=1e-9, rtol=0)
            np.testing.assert_array_equal(real_index.annotation_velocities[a], velocity[:2])
            assert real_index.annotation_translations[a].tolist() == annotation["translation"]
            assert real_index.annotation_sizes_wlh[a].tolist() == annotation["size"]
            assert real_index.annotation_rotations[a].tolist() == annotation["rotation"]
            assert real_index.annotation_num_radar_pts[a] == annotation["num_radar_pts"]
            attribute = real_index.annotation_attributes[a]
            assert ([] if attribute < 0 else [ATTRIBUTES[attribute]]) == attributes
            is_rack = annotation["category_name"] == "static_object.bicycle_rack"
            assert real_index.annotation_is_bike_rack[a] == is_rack
    assert np.isnan(real_index.annotation_velocities).any()


@pytest.mark.parametrize("stretch", [1, 2, 3, 7])
def test_velocities_equal_the_devkit_however_far_apart_samples_are(root: Path, stretch: int) -> None:
    from nuscenes import NuScenes

    table = root / "v1.0-mini" / "sample.json"
    records = json.loads(table.read_text())
    start = records[0]["timestamp"]
    for record in records:
        record["timestamp"] = start + stretch * (record["timestamp"] - start)
    table.write_text(json.dumps(records))
    index, nusc = open_index(root, "v1.0-mini"), NuScenes("v1.0-mini", str(root), verbose=False)
    expected = [nusc.box_velocity(str(token, "utf-8"))[:2] for token in index.annotation_tokens]
    np.testing.assert_array_equal(index.annotation_velocities, expected)
    assert 0 < np.isnan(expected).sum() <= 2 * len(expected)


def test_real_tables(real_index: NuScenesIndex) -> None:
    assert len(real_index.sample_rows("val")) == len(real_index.sample_rows("mini_val")) == 81
    assert real_index.scene_name(0) == "scene-0103"
    assert real_index.dataset_info()["root_name"] == "nuscenes_mini_val"


def test_columns_are_mapped_not_loaded(index: NuScenesIndex) -> None:
    for name in COLUMNS:
        column = getattr(index, name)
        assert isinstance(column, np.memmap)
        assert not column.flags.writeable


def test_pickle_is_a_path(index: NuScenesIndex) -> None:
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000
    other = pickle.loads(pickled)
    np.testing.assert_array_equal(other.annotation_boxes, index.annotation_boxes)


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Counts how often an index is built."""
    folders: list[Path] = []
    build = index_module._build

    def count(folder: Path, *arguments: Any) -> None:
        folders.append(folder)
        build(folder, *arguments)

    monkeypatch.setattr(index_module, "_build", count)
    return folders


def test_built_once_and_again_when_a_table_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = builds(monkeypatch)
    first = open_index(root, "v1.0-mini")
    assert open_index(root, "v1.0-mini").folder == first.folder
    assert len(built) == 1

    table = root / "v1.0-mini" / "sample_annotation.json"
    records = json.loads(table.read_text())
    records[0]["num_lidar_pts"] += 1
    table.write_text(json.dumps(records))
    second = open_index(root, "v1.0-mini")
    assert len(built) == 2
    assert second.fingerprint != first.fingerprint
    assert second.annotation_num_lidar_pts.sum() == first.annotation_num_lidar_pts.sum() + 1
    assert [path.name for path in second.folder.parent.iterdir()] == [second.folder.name]


def test_touched_table_gives_the_same_fingerprint(root: Path, tmp_path: Path) -> None:
    first = open_index(root, "v1.0-mini")
    os.utime(root / "v1.0-mini" / "scene.json", (1, 1))
    assert open_index(root, "v1.0-mini").fingerprint == first.fingerprint
    elsewhere = tmp_path / "another_name"
    shutil.copytree(root, elsewhere)
    assert open_index(elsewhere, "v1.0-mini").fingerprint == first.fingerprint


def test_a_copy_of_the_tables_is_hashed_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, hashed, fingerprint = builds(monkeypatch), [], index_module.fingerprint
    monkeypatch.setattr(index_module, "fingerprint", lambda *a: hashed.append(1) or fingerprint(*a))
    first = open_index(root, "v1.0-mini", tmp_path / "cache")
    nodes = [root, tmp_path / "another node", tmp_path / "a third one"]
    for node in nodes[1:]:
        shutil.copytree(root, node)
    for node in [*nodes, *nodes]:
        if node != root:
            root.rename(tmp_path / "away")
            node.rename(root)
        assert open_index(root, "v1.0-mini", tmp_path / "cache").folder == first.folder
        if node != root:
            root.rename(node)
            (tmp_path / "away").rename(root)
    assert (len(built), len(hashed)) == (1, 2)
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_a_copy_beside_an_index_that_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_index(root, "v1.0-mini")
    root.rename(tmp_path / "away")
    shutil.copytree(tmp_path / "away", root)
    built = builds(monkeypatch)

    def refuse(path: Path, exist_ok: bool = True) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    for _ in range(2):
        assert open_index(root, "v1.0-mini").folder == first.folder
    assert not built


def test_a_damaged_index_that_cannot_be_removed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged = open_index(root, "v1.0-mini").folder
    (damaged / "frame_paths.npy").write_bytes(b"")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if root in path.parents:
            raise OSError(errno.EROFS, "Read-only file system")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    built = builds(monkeypatch)
    folders = {open_index(root, "v1.0-mini").folder for _ in range(3)}
    assert len(built) == len(folders) == 1
    assert tmp_path / "cache" in folders.pop().parents
    assert damaged.is_dir()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_half_built_index_is_never_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = np.save, []

    def run_out_of_space(path: Path, *arguments: Any, **options: Any) -> None:
        saved.append(path)
        if len(saved) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", run_out_of_space)
        with pytest.raises(UserError, match=r"index of v1\.0-mini.*needs [\d,]+ bytes.*No space"):
            open_index(root, "v1.0-mini")
    home = root / ".cpq_train" / "v1.0-mini"
    assert list(home.iterdir()) == []

    killed = home / ".unfinished-of-a-killed-process"
    killed.mkdir()
    (killed / "meta.json").write_text("{}")
    index = open_index(root, "v1.0-mini")
    assert index.folder.parent == home
    assert index.folder != killed
    assert len(index) == 8


def test_processes_may_build_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = builds(monkeypatch)
    monkeypatch.setattr(derived, "find", lambda *_: [])
    with ThreadPoolExecutor(4) as pool:
        indexes = list(pool.map(lambda _: open_index(root, "v1.0-mini"), range(4)))
    assert len(built) == 4
    assert len({index.folder for index in indexes}) == 1
    assert all(len(index) == 8 for index in indexes)
    assert len(list(indexes[0].folder.parent.iterdir())) == 1


def refuse_writing(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if any(folder in path.parents for folder in folders):
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)


def test_read_only_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refuse_writing(monkeypatch, root)
    built = builds(monkeypatch)
    first, second = open_index(root, "v1.0-mini"), open_index(root, "v1.0-mini")
    assert first.folder == second.folder
    assert tmp_path / "cache" / "cpq_train" in first.folder.parents
    assert len(built) == 1
    assert not (root / ".cpq_train").exists()

    refuse_writing(monkeypatch, tmp_path)
    os.utime(root / "v1.0-mini" / "scene.json", (1, 1))
    with pytest.raises(UserError, match=r"Read-only file system.*data\.cache_dir"):
        open_index(root, "v1.0-mini")


def test_cache_dir_keeps_the_root_clean(root: Path, tmp_path: Path) -> None:
    index = open_index(root, "v1.0-mini", tmp_path / "chosen")
    assert tmp_path / "chosen" in index.folder.parents
    assert not (root / ".cpq_train").exists()


def test_progress_over_all_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float]] = []
    read: list[float] = []

    @contextmanager
    def progress(description: str, total: float) -> Iterator[Callable[[float], None]]:
        shown.append((description, total))
        yield read.append

    monkeypatch.setattr(index_module, "_PROGRESS_FROM_BYTES", 0)
    monkeypatch.setattr(index_module, "progress", progress)
    open_index(root, "v1.0-mini")
    assert shown == [("Indexing v1.0-mini (MB)", pytest.approx(sum(read)))]
    assert shown[0][1] > 0


def test_wrong_root_version_and_split(root: Path, index: NuScenesIndex) -> None:
    with pytest.raises(UserError, match=r"data root '.*nowhere' is no folder"):
        open_index(root / "nowhere", "v1.0-mini")
    with pytest.raises(UserError, match=r"data version 'v1\.0-trainval' is not in .*: found v1\.0-mini"):
        open_index(root)
    with pytest.raises(UserError, match=r"split 'test' holds no scene .*mini_val \(1 scenes\)"):
        index.sample_rows("test")
    with pytest.raises(UserError, match=r"sample token 'nonsense' is not one of the 4 samples"):
        index.sample_rows("val", ["nonsense"])
    train_token = index.sample_token(int(index.sample_rows("train")[0]))
    with pytest.raises(UserError, match=train_token):
        index.sample_rows("val", [train_token])
    assert index.sample_rows(None, [train_token]).tolist() == [0]
    (root / "v1.0-mini" / "ego_pose.json").unlink()
    with pytest.raises(UserError, match=r"ego_pose\.json is missing"):
        open_index(root, "v1.0-mini")


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ("sample", "scene_token"),
        ("sample_data", "ego_pose_token"),
        ("sample_data", "prev"),
        ("sample_data", "sample_token"),
        ("sample_annotation", "instance_token"),
        ("sample_annotation", "sample_token"),
    ],
)
def test_dangling_token_is_named(root: Path, table: str, key: str) -> None:
    path = root / "v1.0-mini" / f"{table}.json"
    records = json.loads(path.read_text())
    lidar = [r for r in records if r.get("fileformat", "pcd") == "pcd" and r.get("is_key_frame", True)]
    lidar[0][key] = "lost"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match="'lost'"):
        open_index(root, "v1.0-mini")


def test_sample_without_a_cloud_is_named(root: Path) -> None:
    path = root / "v1.0-mini" / "sample_data.json"
    records = json.loads(path.read_text())
    lost = next(r for r in records if r["is_key_frame"] and r["fileformat"] == "pcd")
    lost["is_key_frame"] = False
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match=f"no LIDAR_TOP key frame for sample {lost['sample_token']}"):
        open_index(root, "v1.0-mini")


def test_no_annotations(root: Path) -> None:
    (root / "v1.0-mini" / "sample_annotation.json").write_text("[]")
    (root / "v1.0-mini" / "instance.json").write_text("[]")
    index = open_index(root, "v1.0-mini")
    assert index.annotation_boxes.shape == (0, 9)
    assert index.annotations(3) == slice(0, 0)
