"""Locks of folders: what a stranger has put there never leads to a file of the user."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cpq_train.common.folders import LOCK_FILE, FolderInUse, locked, remove_remnant


def as_link(lock: Path, own: Path) -> None:
    lock.symlink_to(own)


def as_hard_link(lock: Path, own: Path) -> None:
    os.link(own, lock)


def as_fifo(lock: Path, own: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.parametrize("put", [as_link, as_hard_link, as_fifo])
def test_a_lock_that_is_another_file(put: Callable[[Path, Path], None], tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("of the user")
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder / LOCK_FILE, own)
    for is_new in (True, False):
        with pytest.raises(FolderInUse), locked(folder, is_new):
            pass
    remove_remnant(folder)
    assert own.read_text() == "of the user"


def test_a_remnant_that_is_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / LOCK_FILE).write_text("process 1 on a host")
    (tmp_path / "link").symlink_to(other)
    remove_remnant(tmp_path / "link")
    assert (other / LOCK_FILE).read_text() == "process 1 on a host"


def test_the_next_holder_is_named(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            with pytest.raises(FolderInUse, match=f"by process {os.getpid()} on "), locked(tmp_path):
                pass
            assert (tmp_path / LOCK_FILE).read_text().count("process") == 1
