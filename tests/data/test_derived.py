"""A data root of a stranger: what it ships beside the tables leads to no place outside it."""

from pathlib import Path

import pytest

from cpq_train.common.errors import UserError
from cpq_train.data import derived
from cpq_train.data.gt_database import build_gt_database
from cpq_train.data.index import open_index


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


def test_only_older_ones_are_dropped(root: Path) -> None:
    home = root / ".cpq_train/v1.0-mini"
    names = ["documents", "gt-0123456789abcdef", "0123456789abcdef0", "0123456789abcdef"]
    for name in names:
        (home / name).mkdir(parents=True)
    key = open_index(root, "v1.0-mini").folder.name
    assert {path.name for path in home.iterdir()} == {key, *names[:3]}
