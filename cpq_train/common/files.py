"""Files that appear only when they are whole, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpq_train.common.errors import UserError

PARTIAL = ".partial"
"""Ending of files that are still being written."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """Write a file beside its place and move it there when it is whole and on the disk.

    A reader, and whoever comes after a crash, finds the old file or the new one. If writing fails the old
    one stays and what was written is removed.

    Args:
        path: The file; its folder exists.
        num_bytes: How large it becomes, where that is known.

    Yields:
        What to write to.

    Raises:
        UserError: The disk is full, or a quota or a size limit is met.
    """
    # The process id keeps two runs apart that write one file, such as a cached score.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(_full(path, partial, num_bytes, error)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file at once; see `replacing`."""
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, len(data)) as partial, partial.open("wb") as file:
        file.write(data)


def check_regular(path: Path, what: str) -> None:
    """See that a path is a local regular file, or leads to one, before it is opened.

    A FIFO would block whoever opens it, and a device may have no end.

    Args:
        path: The file.
        what: What it is, for the message.

    Raises:
        UserError: It is none.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        reason = "does not exist"
    except OSError as error:
        reason = f"is not readable: {error.strerror}"
    else:
        if stat.S_ISREG(mode):
            return
        is_folder = stat.S_ISDIR(mode)
        kind = "a folder" if is_folder else "no regular file (a FIFO, socket or device)"
        reason = f"is {kind}: expected a file"
    raise UserError(f"{what} {str(path)!r} {reason}")


def check_writable(folder: Path, option: str) -> None:
    """See that files can be written to a folder, or that it can be made, before there is any work.

    Args:
        folder: The folder.
        option: What names it, for the message.

    Raises:
        UserError: It or what it lies in is no folder, or takes no file.
    """
    there = next(place for place in (folder, *folder.parents) if _exists(place))
    if not there.is_dir():
        what = "is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to"
    else:
        return
    accepted = "a folder to write to, or one that can be made"
    raise UserError(f"{option} {str(folder)!r}: {str(there)!r} {what}; accepted: {accepted}")


def check_output(file: Path, option: str = "output") -> None:
    """See that a file can be written, before there is any work.

    Raises:
        UserError: It is a folder, or what it lies in takes no file.
    """
    if file.is_dir():
        raise UserError(f"{option} {str(file)!r} is a folder; accepted: a file")
    check_writable(file.parent, option)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left behind in a folder."""
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full(path: Path, partial: Path, num_bytes: int | None, error: OSError) -> str:
    partial.unlink(missing_ok=True)
    needed = "" if num_bytes is None else f"it needs {num_bytes} bytes, "
    free = shutil.disk_usage(path.parent).free
    return f"cannot write {str(path)!r}: {needed}{free} bytes are free ({error.strerror})"
