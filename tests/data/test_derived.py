"""A data root of a stranger: what it ships beside the tables leads to no place outside it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.documents import checksum_of
from cpq_train.common.errors import UserError
from cpq_train.data import column_files, derived
from cpq_train.data.column_files import CONTENTS_FILE
from cpq_train.data.gt_database import build_gt_database, open_gt_database
from cpq_train.data.gt_database_parts import COLUMNS as GT_COLUMNS
from cpq_train.data.index import COLUMNS, NuScenesIndex, open_index


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "home"
    for name in ("documents", "0123456789abcdef"):
        (folder / name).mkdir(parents=True)
        (folder / name / "letter").write_text("of the user")
    return folder


def stays(folder: Path) -> None:
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        *("0123456789abcdef", "0123456789abcdef/letter"),
        *("documents", "documents/letter"),
    ]
    assert {path.read_text() for path in folder.glob("*/letter")} == {"of the user"}


@pytest.mark.parametrize("part", [".cpq_train", ".cpq_train/v1.0-mini"])
def test_a_home_that_is_a_link(root: Path, outside: Path, part: str) -> None:
    (root / part).parent.mkdir(exist_ok=True)
    (root / part).symlink_to(outside)
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    assert outside.with_name("cache") in open_index(root, "v1.0-mini").folder.parents
    stays(outside)


def test_folders_that_are_links(root: Path, outside: Path) -> None:
    index = open_index(root, "v1.0-mini")
    home, key = index.folder.parent, index.folder.name
    index.folder.rename(outside.with_name("moved"))
    for name in (key, "0123456789abcdef"):
        (home / name).symlink_to(outside)
    assert open_index(root, "v1.0-mini").folder == home / key
    assert not (home / key).is_symlink()
    parts = derived.parts_folder([home], "gt-0123456789abcdef")
    parts.rmdir()
    parts.symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        derived.parts_folder([home], "gt-0123456789abcdef")
    stays(outside)


def test_a_file_in_the_place_of_a_folder(root: Path) -> None:
    folder = open_index(root, "v1.0-mini").folder
    shutil.rmtree(folder)
    folder.write_text("x")
    assert open_index(root, "v1.0-mini").folder == folder


def test_only_older_ones_are_dropped(root: Path) -> None:
    home = root / ".cpq_train/v1.0-mini"
    names = ["documents", "gt-0123456789abcdef", "0123456789abcdef0", "0123456789abcdef"]
    for name in names:
        (home / name).mkdir(parents=True)
    key = open_index(root, "v1.0-mini").folder.name
    assert {path.name for path in home.iterdir()} == {key, *names[:3]}


def test_every_column_has_its_kind(index: NuScenesIndex) -> None:
    fields = [name for name in NuScenesIndex.__annotations__ if name.startswith(("s", "frame", "annotation"))]
    assert set(COLUMNS) == set(fields) - {"splits"}


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what is said of the columns, and let the checksum fit, as anybody can."""
    contents = json.loads((folder / CONTENTS_FILE).read_text())["contents"]
    change(contents["columns"])
    document = {"crc32": checksum_of(contents), "contents": contents}
    (folder / CONTENTS_FILE).write_text(json.dumps(document))


def replace(folder: Path, name: str, column: np.ndarray) -> None:
    """Another column, with all that is said of it."""
    np.save(folder / f"{name}.npy", column)
    crc32 = column_files.checksum(column)
    of_column = {"dtype": column.dtype.str, "shape": column.shape, "crc32": crc32}
    forge(folder, lambda columns: columns.update({name: of_column}))


SAID: dict[str, dict[str, Any]] = {
    "objects": {"dtype": "|O"},
    "garbage": {"dtype": "garbage"},
    "of no bytes": {"dtype": "|S0", "shape": [1 << 62]},
    "of another order": {"dtype": ">f8"},
    "of three bytes": {"dtype": "<f3"},
    "long": {"shape": [1 << 70, 9]},
    "shorter": {"shape": [2, 9]},
    "flat": {"shape": [18]},
    "unsigned": {"dtype": "<u8"},
    "wide": {"dtype": "<f16"},
    "a structure": {"dtype": "f8,f8"},
    "without a checksum": {"crc32": None},
}


@pytest.mark.parametrize("way", SAID)
def test_a_column_that_is_said_to_be_another(
    root: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_index(root, "v1.0-mini")
    forge(first.folder, lambda columns: columns["annotation_boxes"].update(SAID[way]))
    again = open_index(root, "v1.0-mini")
    assert "the index of v1.0-mini is built anew" in capsys.readouterr().err
    assert again.annotation_boxes.dtype == np.float64
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    database = open_gt_database(again, "train", 1)
    forge(database.folder, lambda columns: columns["boxes"].update(SAID[way]))
    with pytest.raises(UserError, match="build the GT database anew"):
        open_gt_database(again, "train", 1)


INDEX_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sample_scenes": lambda column: column + 2,
    "sample_frames": lambda column: column + 1000,
    "frame_previous": lambda column: column - 1,
    "annotation_offsets": lambda column: column[::-1].copy(),
    "annotation_classes": lambda column: np.full_like(column, 99),
    "annotation_attributes": lambda column: np.full_like(column, -2),
    "scene_names": lambda column: np.full_like(column, b"\xff"),
}


@pytest.mark.parametrize("name", INDEX_VALUES)
def test_values_that_no_index_has(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(root, "v1.0-mini")
    whole = np.array(getattr(index, name))
    replace(index.folder, name, INDEX_VALUES[name](whole))
    with pytest.raises(UserError, match=f"{name}.npy is damaged: "):
        getattr(open_index(root, "v1.0-mini"), name)
    np.testing.assert_array_equal(getattr(open_index(root, "v1.0-mini"), name), whole)


DATABASE_VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "classes": lambda column: np.full_like(column, 10),
    "sample_rows": lambda column: column + 1000,
    "point_offsets": lambda column: column + 1,
    "num_points": lambda column: -1 - column,
    "tokens": lambda column: np.full_like(column, b"\xff"),
}


@pytest.mark.parametrize("name", DATABASE_VALUES)
def test_values_that_no_database_has(root: Path, name: str) -> None:
    build_gt_database(root, "v1.0-mini", num_sweeps=1, num_workers=0)
    index = open_index(root, "v1.0-mini")
    database = open_gt_database(index, "train", 1)
    replace(database.folder, name, DATABASE_VALUES[name](np.array(getattr(database, name))))
    with pytest.raises(UserError, match=f"{name}.npy is damaged: "):
        _ = [getattr(open_gt_database(index, "train", 1), column) for column in GT_COLUMNS]
