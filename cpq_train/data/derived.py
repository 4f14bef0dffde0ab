"""Where folders that are derived from a data set lie, and how they appear there complete or not at all.

They lie in `<root>/.cpq_train/<version>/`, or in the user's cache where the root cannot be written. The
name of a folder is its kind, if any, a dash and a key of all that it was derived from, so that an outdated
one is never found; it gets this name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from cpq_train.common.errors import UserError

UNFINISHED = ".unfinished"
"""Prefix of the names of incomplete folders."""


def homes(root: Path, version: str, cache_dir: str | Path | None) -> list[Path]:
    """The folders that may hold what is derived from a version of a data set, in order of preference.

    Args:
        root: the data root.
        version: name of the folder of tables.
        cache_dir: the only place, if given; None means the root, or the user's cache.
    """
    unique = f"{root.resolve().name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]}"
    if cache_dir is not None:
        return [Path(cache_dir).expanduser() / unique / version]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [root / ".cpq_train" / version, user_cache / "cpq_train" / unique / version]


def find(places: list[Path], name: str) -> Path | None:
    """The complete folder of a name, in the first home that has it."""
    return next((home / name for home in places if (home / name).is_dir()), None)


def start_folder(places: list[Path], name: str, is_resumable: bool = False) -> Path:
    """Makes an incomplete folder in the first home that can be written.

    Args:
        places: the homes.
        name: what the folder is called when it is complete.
        is_resumable: the folder of an earlier call is taken up; otherwise each call has one of its own.

    Raises:
        UserError: none can.
    """
    refusals = []
    for home in places:
        unfinished = home / f"{UNFINISHED}-{name}-{'parts' if is_resumable else uuid.uuid4().hex}"
        try:
            unfinished.mkdir(parents=True, exist_ok=is_resumable)
        except OSError as error:
            refusals.append(f"{home} ({error.strerror})")
        else:
            return unfinished
    raise UserError(
        f"no folder derived from the data set can be written: {', '.join(refusals)}; give data.cache_dir"
    )


def publish(unfinished: Path, folder: Path) -> None:
    """Gives a complete folder its final name; where another process was first, its folder is kept."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def drop_others(folder: Path) -> None:
    """Removes the folders of the same kind beside a complete one."""
    for other in folder.parent.iterdir():
        if other != folder and _kind(other) == _kind(folder):
            shutil.rmtree(other, ignore_errors=True)


def _kind(folder: Path) -> str:
    return folder.name.rpartition("-")[0]
