"""Where folders that are derived from a data set lie, and how they appear there complete or not at all.

They lie in `<root>/.cpq_train/<version>/`, or in the user's cache where the root cannot be written. The
name of a folder is its kind, if any, a dash and a key of all that it was derived from, so that an outdated
one is never found; it gets this name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpq_train.common.errors import UserError
from cpq_train.common.folders import LOCK_FILE, locked, naming_full_disks, remove_remnant

UNFINISHED = ".unfinished"
"""Prefix of the names of incomplete folders."""

_PARTS = "parts"

_NAME = re.compile(r"(?:[a-z]+-)?[0-9a-f]{16}")
"""Names of complete folders: other ones are not ours."""


def homes(root: Path, version: str, cache_dir: str | Path | None) -> list[Path]:
    """The folders that may hold what is derived from a version of a data set, in order of preference.

    A data root may be a stranger's: what leads out of it by a link is left out.

    Args:
        root: the data root.
        version: name of the folder of tables.
        cache_dir: the only place, if given; None means the root, or the user's cache.
    """
    unique = f"{root.resolve().name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / unique / version]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    in_root = root / ".cpq_train" / version
    inside = Path(os.path.realpath(in_root)).is_relative_to(os.path.realpath(root))
    return [*([in_root] if inside else []), user_cache / "cpq_train" / unique / version]


def find(places: list[Path], name: str) -> list[Path]:
    """The complete folders of a name, in the order of the homes; links are none."""
    return [home / name for home in places if _is_folder(home / name)]


@contextmanager
def new_folder(places: list[Path], name: str) -> Iterator[Path]:
    """An incomplete folder of this process's own in the first home that can be written, gone at the end.

    What ended processes have left of such folders is removed first.

    Args:
        places: the homes.
        name: what the folder is called when it is complete.

    Raises:
        UserError: none can be written.
    """
    for home in places:
        for other in home.glob(f"{UNFINISHED}-*"):
            of, _, ending = other.name.removeprefix(f"{UNFINISHED}-").rpartition("-")
            if ending != _PARTS and _kind(of) == _kind(name):
                remove_remnant(other)
    unfinished = start_folder(places, _unfinished(name, uuid.uuid4().hex))
    try:
        with naming_full_disks("what is derived from the data set", unfinished.parent), locked(unfinished):
            yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def parts_folder(places: list[Path], name: str) -> Path:
    """The folder of parts of what is to be called by a name, made in the first home that can be written.

    It stays when its process ends, so that the next one goes on from there.

    Raises:
        UserError: none can be written.
    """
    return start_folder(places, _unfinished(name, _PARTS))


def start_folder(places: list[Path], name: str) -> Path:
    """Makes a folder in the first home that can be written, where it is not there.

    Raises:
        UserError: none can.
    """
    refusals = []
    for home in places:
        try:
            (home / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refusals.append(f"{home} ({error.strerror})")
            continue
        if _is_folder(home / name):
            return home / name
        refusals.append(f"{home} ({name} there is a link)")
    raise UserError(
        f"no folder derived from the data set can be written: {', '.join(refusals)}; give data.cache_dir"
    )


def publish(unfinished: Path, folder: Path) -> None:
    """Gives a complete folder its final name; where another process was first, its folder is kept."""
    (unfinished / LOCK_FILE).unlink(missing_ok=True)
    try:
        if not _is_folder(folder):
            folder.unlink(missing_ok=True)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def discard(folder: Path) -> bool:
    """Removes a folder that is damaged; nobody finds it from the first moment on.

    Returns:
        Whether it is gone: not from where this process cannot write to.
    """
    aside = folder.with_name(_unfinished(folder.name, uuid.uuid4().hex))
    try:
        folder.rename(aside)
    except OSError as error:
        return isinstance(error, FileNotFoundError)  # another process was first
    shutil.rmtree(aside, ignore_errors=True)
    return True


def drop_others(folder: Path) -> None:
    """Removes the folders of the same kind beside a complete one."""
    for other in folder.parent.iterdir():
        is_older = other != folder and _NAME.fullmatch(other.name) and _is_folder(other)
        if is_older and _kind(other.name) == _kind(folder.name):
            shutil.rmtree(other, ignore_errors=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _unfinished(name: str, ending: str) -> str:
    return f"{UNFINISHED}-{name}-{ending}"


def _kind(name: str) -> str:
    return name.rpartition("-")[0]
