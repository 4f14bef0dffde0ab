"""What is derived from a data set and was damaged is made anew with a line that says so, or refused."""

import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from limits import files_of_at_most

from cpq_train.common.errors import UserError
from cpq_train.common.folders import LOCK_FILE, locked
from cpq_train.data import column_files, derived
from cpq_train.data.column_files import CONTENTS_FILE, DamageError
from cpq_train.data.gt_database import build_gt_database, open_gt_database
from cpq_train.data.gt_database_parts import COLUMNS as GT_COLUMNS
from cpq_train.data.index import COLUMNS, NuScenesIndex, open_index


def flip(path: Path) -> None:
    """Change a bit of the last byte, and leave size and modification time as they were."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def columns_of(index: NuScenesIndex) -> dict[str, np.ndarray]:
    return {name: np.array(getattr(index, name)) for name in COLUMNS}


@pytest.fixture(scope="module")
def pristine_index(pristine_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_index(pristine_root, "v1.0-mini", tmp_path_factory.mktemp("whole")).folder


@pytest.fixture
def cache(pristine_root: Path, pristine_index: Path, tmp_path: Path) -> Path:
    """A copy of the index's home to damage."""
    shutil.copytree(pristine_index.parents[2], tmp_path / "cache")
    return tmp_path / "cache"


def found(cache: Path, name: str) -> Path:
    (path,) = cache.glob(f"*/*/*/{name}")
    return path


def is_built_anew(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(root, "v1.0-mini", cache)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the index of v1.0-mini is built anew: " in lines[0]
    assert open_index(root, "v1.0-mini", cache).folder == index.folder
    assert capsys.readouterr().err == ""
    assert [path.name for path in index.folder.parent.iterdir()] == [index.folder.name]
    expected = columns_of(open_index(root, "v1.0-mini", cache.parent / "another"))
    for name, column in columns_of(index).items():
        np.testing.assert_array_equal(column, expected[name])


@pytest.mark.parametrize("name", COLUMNS)
def test_a_flipped_bit_in_a_column(
    pristine_root: Path, cache: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(found(cache, f"{name}.npy"))
    is_built_anew(pristine_root, cache, capsys)


def rewrite(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


WAYS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("nonsense"),
    "another type": rewrite(lambda column: column.astype(np.int64)),
    "another length": rewrite(lambda column: column[:-1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_column(
    pristine_root: Path, cache: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    WAYS[way](found(cache, "annotation_boxes.npy"))
    is_built_anew(pristine_root, cache, capsys)


CONTENTS: dict[str, Callable[[str], str]] = {
    "no text": lambda text: "",
    "no document": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
    "cut": lambda text: text[:-20],
    "another fingerprint": lambda text: re.sub(r'"fingerprint": "(.)', '"fingerprint": "x', text),
    "another split": lambda text: text.replace('"mini_train": ["', '"mini_val": ["'),
    "another type": lambda text: text.replace('"<f8"', '"<i8"', 1),
    "no column": lambda text: text.replace('"sample_times_us"', '"sample_times"'),
    "wrong types": lambda text: text.replace('"crc32": ', '"crc32": "', 1),
    "another shape": lambda text: text.replace('"shape": [8]', '"shape": [7]', 1),
}


@pytest.mark.parametrize("way", CONTENTS)
def test_damaged_contents(
    pristine_root: Path, cache: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = found(cache, CONTENTS_FILE)
    changed = CONTENTS[way](path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    is_built_anew(pristine_root, cache, capsys)


def test_what_a_disk_changes_by_itself(pristine_root: Path, cache: Path) -> None:
    path = found(cache, "annotation_boxes.npy")
    flip(path)
    (path.parent / CONTENTS_FILE).touch()  # nothing seems to have changed since
    index = open_index(pristine_root, "v1.0-mini", cache)
    assert len(index.sample_rows("val")) == 4
    with pytest.raises(DamageError, match=r"annotation_boxes\.npy is damaged"):
        _ = index.annotation_boxes
    assert not path.exists()
    assert np.isfinite(open_index(pristine_root, "v1.0-mini", cache).annotation_boxes[:, :7]).all()


def test_a_worker_names_damage_in_a_line() -> None:
    text = (
        "Caught DamageError in DataLoader worker process 0.\nTraceback\n  module.DamageError: it is damaged\n"
    )
    assert str(DamageError(text)) == "it is damaged"


def test_opening_reads_no_column(
    pristine_root: Path, pristine_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    checksum = column_files.checksum
    monkeypatch.setattr(column_files, "checksum", lambda c: read.append(1) or checksum(c))
    index = open_index(pristine_root, "v1.0-mini", pristine_index.parents[2])
    assert not read
    for _ in range(3):
        assert len(index.sample_times_us) == 8
    assert len(read) == 1
    assert not hasattr(index, "sample_timess")


def test_columns_that_only_seem_changed_are_read_once(
    pristine_root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    checksum = column_files.checksum
    monkeypatch.setattr(column_files, "checksum", lambda c: read.append(1) or checksum(c))
    time.sleep(0.02)  # change times are coarse
    for path in found(cache, CONTENTS_FILE).parent.glob("*.npy"):
        path.chmod(0o644)
    for num_read in (len(COLUMNS), 0, 0):
        read.clear()
        open_index(pristine_root, "v1.0-mini", cache)
        assert len(read) == num_read


def test_a_table_edited_in_secret(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "v1.0-mini/sample_annotation.json"
    before = path.stat()
    first = open_index(root, "v1.0-mini").annotation_num_lidar_pts.sum()
    text = re.sub(
        r'("num_lidar_pts": )(\d)', lambda m: f"{m[1]}{(int(m[2]) + 1) % 10}", path.read_text(), count=1
    )
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert open_index(root, "v1.0-mini").annotation_num_lidar_pts.sum() != first
    assert "is built anew: its tables are others" in capsys.readouterr().err


REMNANT = f".unfinished-{'a' * 16}-{'b' * 32}"


def remnant(root: Path, age_s: float = 0, lock: str | None = "process 1 on a host") -> Path:
    folder = root / ".cpq_train/v1.0-mini" / REMNANT
    folder.mkdir(parents=True)
    (folder / "scene_names.npy").write_text("half")
    if lock is not None:
        (folder / LOCK_FILE).write_text(lock)
    os.utime(folder, (time.time() - age_s,) * 2)
    return folder


@pytest.mark.parametrize(("age_s", "lock"), [(0, "process 1 on a host"), (7200, None), (7200, "")])
def test_what_a_killed_process_leaves_is_removed(root: Path, age_s: float, lock: str | None) -> None:
    folder = remnant(root, age_s, lock)
    open_index(root, "v1.0-mini")
    assert not folder.exists()


def test_what_another_process_writes_stays(root: Path) -> None:
    folder = remnant(root, age_s=7200)
    with locked(folder):
        open_index(root, "v1.0-mini")
    assert folder.exists()


def test_what_another_process_has_just_begun_stays(root: Path) -> None:
    folder = remnant(root, lock=None)
    open_index(root, "v1.0-mini")
    assert folder.exists()


def test_a_full_disk_while_an_index_is_built(root: Path) -> None:
    for num_bytes in (0, 100, 500, 4000):
        with files_of_at_most(num_bytes), pytest.raises(UserError) as error:
            open_index(root, "v1.0-mini")
        message = str(error.value)
        assert "cannot write the index of v1.0-mini to " in message
        assert re.search(r"it needs [\d,]+ bytes, [\d,]+ bytes are free .* nothing is left behind", message)
        assert "\n" not in message
        assert list((root / ".cpq_train/v1.0-mini").iterdir()) == []
    assert len(open_index(root, "v1.0-mini")) == 8


def test_a_damaged_database_that_cannot_be_removed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    index = open_index(root, "v1.0-mini")
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    (damaged,) = (root / ".cpq_train/v1.0-mini").glob("gt-*")
    whole = derived.homes(root, "v1.0-mini", None)[1] / damaged.name
    shutil.copytree(damaged, whole)
    WAYS["cut"](damaged / "boxes.npy")
    assert open_gt_database(index, "train", 1).folder == whole


@pytest.fixture
def database(root: Path) -> Path:
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    (folder,) = (root / ".cpq_train/v1.0-mini").glob("gt-*")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def use(root: Path) -> None:
    database = open_gt_database(open_index(root, "v1.0-mini"), "train", 1)
    for row in range(len(database)):
        database.points_of(row)
    for name in GT_COLUMNS:
        getattr(database, name)


@pytest.mark.parametrize("name", GT_COLUMNS)
@pytest.mark.parametrize("way", ["flipped", "missing", "cut"])
def test_a_damaged_database(
    root: Path, database: Path, name: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, file = contents(database), database / f"{name}.npy"
    {"flipped": flip, "missing": Path.unlink, "cut": WAYS["cut"]}[way](file)
    with pytest.raises(UserError, match=r"damaged|not readable") as error:
        use(root)
    assert "build-gt-database" in str(error.value)
    capsys.readouterr()
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    said = capsys.readouterr().err
    assert "the GT database is built anew" in said
    assert contents(database) == whole
    use(root)


def test_what_a_disk_changes_in_a_database(root: Path, database: Path) -> None:
    flip(database / "boxes.npy")
    (database / CONTENTS_FILE).touch()  # nothing seems to have changed since
    opened = pickle.loads(pickle.dumps(open_gt_database(open_index(root, "v1.0-mini"), "train", 1)))
    command = f"build-gt-database --root {root} --version v1.0-mini --split train --num_sweeps 1"
    with pytest.raises(DamageError, match=rf"boxes\.npy is damaged(.|\n)*{re.escape(command)}") as error:
        _ = opened.boxes
    assert "start again" not in str(error.value)


def of_part(**columns: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Other columns in a part, as a stranger would write it."""

    def change(path: Path) -> None:
        part = dict(np.load(path))
        np.savez(path, **part | {name: changed(part[name]) for name, changed in columns.items()})

    return change


def packed_zeros(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("points.npy", bytes(1 << 27))


PARTS: dict[str, Callable[[Path], object]] = {
    "of no class": of_part(classes=lambda column: np.full_like(column, 99)),
    "of other rows": of_part(sample_rows=lambda column: column + 1000),
    "of fewer objects": of_part(classes=lambda column: column[1:]),
    "of flat points": of_part(points=lambda column: column.ravel()),
    "of fewer points": of_part(points=lambda column: column[1:]),
    "of texts": of_part(num_points=lambda column: column.astype(np.bytes_)),
    "expanding": packed_zeros,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("way", ["flipped", "empty", "text", "bomb", *PARTS])
def test_a_damaged_part(
    root: Path, database: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cpq_train.data.gt_database as module

    whole = contents(database)
    shutil.rmtree(database)
    with monkeypatch.context() as patch:
        patch.setattr(module, "merge_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    (part,) = (root / ".cpq_train/v1.0-mini").glob(".unfinished-gt-*/*.npz")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 41, 5)}
    if way == "bomb":
        with part.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
    elif way in PARTS:
        PARTS[way](part)
    else:
        part.write_bytes({"flipped": data, "empty": b"", "text": b"nonsense"}[way])
    capsys.readouterr()
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    assert f"{part} is damaged and built anew" in capsys.readouterr().err
    assert contents(database) == whole


def test_a_full_disk_while_a_database_is_built(root: Path) -> None:
    open_index(root, "v1.0-mini")
    for num_bytes in (100, 2000):
        with files_of_at_most(num_bytes), pytest.raises(UserError) as error:
            build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
        assert re.search(r"it needs [\d,]+ bytes, [\d,]+ bytes are free", str(error.value))
        assert "\n" not in str(error.value)
        assert not list((root / ".cpq_train/v1.0-mini").glob("gt-*"))
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    use(root)


def test_scene_names_name_no_other_place(root: Path) -> None:
    path = root / "v1.0-mini/scene.json"
    path.write_text(json.dumps([{**r, "name": f"../../{r['name']}"} for r in json.loads(path.read_text())]))
    from cpq_train.data import gt_database_parts

    index = open_index(root, "v1.0-mini")
    folder = root / "a/b/parts"
    folder.mkdir(parents=True)
    files = gt_database_parts.build_parts(index, np.arange(len(index)), folder, 1, 0)
    assert {file.parent for file in files} == {folder}
    assert sorted(folder.iterdir()) == sorted(files)
