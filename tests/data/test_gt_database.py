import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.gt_database import GtDatabase, build_gt_database, open_gt_database
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.sweeps import CloudError, load_sweeps
from cpq_train.verbs.cli import main


@pytest.fixture(scope="module")
def database(simulated_index: NuScenesIndex, simulated_cache: Path) -> GtDatabase:
    return open_gt_database(simulated_index, "train", 2, simulated_cache)


def test_objects_are_the_annotations_with_points(
    database: GtDatabase, simulated_index: NuScenesIndex
) -> None:
    index, expected = simulated_index, []
    for row in index.sample_rows("train"):
        for a in range(index.annotation_offsets[row], index.annotation_offsets[row + 1]):
            has_points = index.annotation_num_lidar_pts[a] + index.annotation_num_radar_pts[a] > 0
            if index.annotation_classes[a] >= 0 and has_points:
                expected.append((row, a))
    rows, annotations = np.array(expected).T
    assert len(database) == len(expected) > 100
    np.testing.assert_array_equal(database.sample_rows, rows)
    np.testing.assert_array_equal(database.tokens, index.annotation_tokens[annotations])
    np.testing.assert_array_equal(database.boxes, index.annotation_boxes[annotations])
    np.testing.assert_array_equal(database.classes, index.annotation_classes[annotations])
    assert set(database.classes.tolist()) == set(range(10))


def test_points_equal_the_devkits_choice(database: GtDatabase, simulated_index: NuScenesIndex) -> None:
    for row in simulated_index.sample_rows("train")[:3]:
        cloud = load_sweeps(simulated_index, int(row), 2)
        for n in np.flatnonzero(database.sample_rows == row):
            box = database.boxes[n]
            devkit = Box(box[:3], box[[4, 3, 5]], Quaternion(axis=[0, 0, 1], radians=box[6]))
            expected = cloud[points_in_box(devkit, cloud[:, :3].astype(np.float64).T)]
            points = database.points_of(n)
            assert len(points) == database.num_points[n] == len(expected)
            np.testing.assert_allclose(points, expected, atol=1e-5, rtol=0)
            relative = database.points[database.point_offsets[n] : database.point_offsets[n + 1]]
            assert (np.linalg.norm(relative[:, :3], axis=1) <= np.linalg.norm(box[3:6]) / 2 + 1e-4).all()
    assert len(np.unique(database.points[:, 4])) > 1  # the sweep before is there too


def test_columns_are_mapped_and_pickle_as_a_path(database: GtDatabase) -> None:
    assert isinstance(database.points, np.memmap)
    assert not database.points.flags.writeable
    pickled = pickle.dumps(database)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).boxes, database.boxes)


def build(root: Path, cache: Path, num_workers: int = 0) -> Path:
    main(
        [
            "build-gt-database",
            *("--root", str(root), "--num_sweeps", "2", "--num_workers", str(num_workers)),
            *("--cache_dir", str(cache)),
        ]
    )
    (folder,) = cache.glob("*/*/gt-*")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_command_line_and_workers(
    simulated_root: Path, database: GtDatabase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build(simulated_root, tmp_path, num_workers=2)
    printed = capsys.readouterr().out
    number = int(np.count_nonzero(database.classes == 8))
    assert re.search(rf"pedestrian\W+{number}\W+\d+", printed)
    assert folder.name == database.folder.name
    assert contents(folder) == contents(database.folder)


KILLED = """
import os, signal, sys
import numpy as np
from cpq_train.verbs.cli import main
save, calls = np.{function}, []
def killing(file, *args, **columns):
    calls.append(file)
    if {moment}:
        if hasattr(file, "write"):
            file.write(b"half")
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(file, *args, **columns)
np.{function} = killing
main(sys.argv[1:])
"""
IN_THE_SECOND_PART = ("savez", "len(calls) == 2", 1)
IN_MERGING = ("save", "file.name == 'num_points.npy'", 3)


@pytest.mark.parametrize(("function", "moment", "num_parts"), [IN_THE_SECOND_PART, IN_MERGING])
def test_killed_build_goes_on(
    simulated_root: Path, database: GtDatabase, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    function: str, moment: str, num_parts: int,
) -> None:  # fmt: skip
    script = KILLED.format(function=function, moment=moment)
    arguments = ["build-gt-database", "--root", str(simulated_root), "--num_sweeps", "2"]
    arguments += ["--num_workers", "0", "--cache_dir", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], env=dict(os.environ), check=False)
    assert killed.returncode == -signal.SIGKILL
    (parts,) = tmp_path.glob("*/*/.unfinished-gt-*")
    finished = {file: file.stat().st_mtime_ns for file in parts.glob("scene-*.npz")}
    assert len(finished) == num_parts
    assert not list(tmp_path.glob("*/*/gt-*"))
    folder = build(simulated_root, tmp_path)
    assert f"objects of {num_parts} of 3 scenes are there already" in capsys.readouterr().err
    assert contents(folder) == contents(database.folder)
    assert not list(tmp_path.glob("*/*/.unfinished*"))


def test_a_database_that_is_there_is_kept(
    simulated_root: Path, simulated_cache: Path, database: GtDatabase
) -> None:
    before = (database.folder / "points.npy").stat().st_mtime_ns
    build(simulated_root, simulated_cache)
    assert (database.folder / "points.npy").stat().st_mtime_ns == before


def test_other_data_never_find_it(root: Path) -> None:
    """Of changed tables, another split or other sweeps."""
    from cpq_train.data.index import open_index

    build_gt_database(root, "v1.0-mini", num_sweeps=3, num_workers=0)
    index = open_index(root, "v1.0-mini")
    assert len(open_gt_database(index, "train", 3)) > 10
    for split, num_sweeps in (("val", 3), ("train", 2)):
        command = (
            f"python -m cpq_train build-gt-database --root {root} --version v1.0-mini "
            f"--split {split} --num_sweeps {num_sweeps}"
        )
        with pytest.raises(UserError, match=re.escape(command)):
            open_gt_database(index, split, num_sweeps)
    table = root / "v1.0-mini" / "sample_annotation.json"
    table.write_text(json.dumps(json.loads(table.read_text()), indent=3))
    with pytest.raises(UserError, match="none of its present tables"):
        open_gt_database(open_index(root, "v1.0-mini"), "train", 3)


def test_a_rebuilt_index_leaves_databases_alone(root: Path) -> None:
    from cpq_train.data.index import open_index

    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    (root / "v1.0-mini" / "scene.json").touch()
    assert len(open_gt_database(open_index(root, "v1.0-mini"), "train", 1)) > 10


def test_bad_inputs(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        build_gt_database(tmp_path / "absent")
    with pytest.raises(UserError, match="split 'test' holds no scene"):
        build_gt_database(root, "v1.0-mini", "test")
    with pytest.raises(UserError, match="num_sweeps is 11: expected 1 to 10"):
        build_gt_database(root, "v1.0-mini", num_sweeps=11)
    with pytest.raises(UserError, match="num_workers is -1: expected 0 or more"):
        build_gt_database(root, "v1.0-mini", num_workers=-1)
    table = root / "v1.0-mini" / "sample_annotation.json"
    table.write_text("[]")
    with pytest.raises(UserError, match=r"split 'train' of v1.0-mini in .* holds no annotated object"):
        build_gt_database(root, "v1.0-mini")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_cloud_is_named(root: Path, num_workers: int) -> None:
    from cpq_train.data.index import open_index

    index = open_index(root, "v1.0-mini")
    path = index.frame_path(index.sample_frames[index.sample_rows("train")[2]])
    path.unlink()
    with pytest.raises(CloudError, match=re.escape(f"cloud {path} of sample")):
        build_gt_database(root, "v1.0-mini", num_workers=num_workers)


def test_all_classes_have_a_target() -> None:
    from cpq_train.data.gt_sampling import TARGETS

    assert tuple(TARGETS) == DETECTION_CLASSES
