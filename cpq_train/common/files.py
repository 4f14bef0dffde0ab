"""Files that appear only when they are whole, and disks that are full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpq_train.common.errors import UserError

PARTIAL = ".partial"
"""Ending of files that are still being written."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota or a limit that is full."""


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
    partial.unlink(missing_ok=True)  # a link that lay there would lead elsewhere
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except OSError as error:
        if error.errno in FULL or error.filename == str(partial):
            partial.unlink(missing_ok=True)
            raise UserError(cannot_write(path, num_bytes, error)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file at once; see `replacing`."""
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, len(data)) as partial, partial.open("wb") as file:
        file.write(data)


def copy_whole(source: Path, path: Path) -> None:
    """Write a file that is the same as another, byte for byte; see `replacing`."""
    with replacing(path, source.stat().st_size) as partial:
        shutil.copyfile(source, partial)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def append_whole(path: Path, text: str) -> None:
    """Add text to the end of a file, all of it or nothing.

    Raises:
        UserError: The disk is full, or the path is a link.
    """
    data = text.encode()
    if path.is_symlink():  # which may lead anywhere, in a folder that came from elsewhere
        raise UserError(f"cannot write {str(path)!r}: it is a link; accepted: a file of its own")
    with path.open("ab", buffering=0) as file:
        size, left = file.tell(), data
        try:
            while left:  # a disk that takes a part says at the next write why
                left = left[file.write(left) :]
        except OSError as error:
            file.truncate(size)
            raise UserError(cannot_write(path, len(data), error)) from error


def check_regular(path: Path, what: str) -> None:
    """See that a file is there, and that it is one: reading a FIFO or a device may never end.

    Args:
        path: The file; a URL is none.
        what: What it is, for the message, such as "checkpoint".

    Raises:
        UserError: It is missing, a folder, no regular file, or cannot be reached.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        reason = "does not exist"
    except (OSError, ValueError) as error:  # a null character in the name
        reason = f"is not readable: {getattr(error, 'strerror', error)}"
    else:
        if stat.S_ISREG(mode):
            return
        kind = "folder" if stat.S_ISDIR(mode) else "FIFO, socket or device"
        reason = f"is a {kind}: expected a file"
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


def cannot_write(path: Path, num_bytes: int | None, error: OSError) -> str:
    """Why a file is not written; where the disk is full, with what is needed and what is free.

    Args:
        path: The file.
        num_bytes: How large it becomes, where that is known.
        error: What the system said.
    """
    if error.errno not in FULL:
        return f"cannot write {str(path)!r}: {error.strerror}"
    stays = "; the file that is there stays as it is" if path.exists() else ""
    return f"cannot write {str(path)!r}: {room(path.parent, num_bytes)} ({error.strerror}){stays}"


def room(folder: Path, num_bytes: int | None) -> str:
    """What is needed, where that is known, and what is free on the disk of a folder, which may be gone."""
    needed = "" if num_bytes is None else f"it needs {num_bytes:,} bytes, "
    there = next(place for place in (folder, *folder.parents) if _exists(place))
    return f"{needed}{shutil.disk_usage(there).free:,} bytes are free"
