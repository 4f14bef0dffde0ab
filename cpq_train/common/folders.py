"""Folders that are still being written: who writes one, and disks that are full.

A folder is locked while it is written, and the system takes the lock from a process that has ended, in
whatever way: what nobody holds is a remnant.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpq_train.common.errors import LoadingError, UserError
from cpq_train.common.files import room

LOCK_FILE = ".lock"

_HOLDER = "process "

_STALE_S = 3600.0
"""Age of a folder without a lock, from which on nobody is about to lock it."""

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class FolderInUse(UserError):
    """Another process writes to a folder."""


class FullDiskError(LoadingError):
    """A disk takes no more."""


@contextmanager
def locked(folder: Path, is_new: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which is there.

    Args:
        folder: The folder.
        is_new: It may have no lock yet.

    Yields:
        Whether it keeps others out: not every file system of a cluster has locks.

    Raises:
        FolderInUse: Another process has it, which is named, or has finished it just now.
    """
    path = folder / LOCK_FILE
    gone = f"{str(folder)!r} has been finished or removed just now"
    try:
        # What a stranger has put there may be a link to a file of the user, or a FIFO.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if is_new else 0)
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError as error:
        raise FolderInUse(gone) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise FolderInUse(f"{str(path)!r} is a link") from error
    with open(descriptor, "rb+", buffering=0) as file:
        if not _is_own_file(os.fstat(descriptor)):
            raise FolderInUse(f"{str(path)!r} is no file of its own")
        has_locks = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = (file.read(200) or b"another process").decode("ascii", "replace")
            raise FolderInUse(f"{str(folder)!r} is being written by {who}") from error
        except OSError:
            has_locks = False
        if not _is_file(path, descriptor):
            raise FolderInUse(gone)
        with suppress(OSError):  # a full disk, which the lock does not need
            file.seek(0)
            file.truncate(0)
            file.write(f"{_HOLDER}{os.getpid()} on {socket.gethostname()}".encode())
        yield has_locks


def is_lock(path: Path) -> bool:
    """Whether a file is the lock of a folder, of this user, and no link to one; held or not."""
    with suppress(OSError):
        status = path.lstat()
        is_ours = _is_own_file(status) and status.st_uid == os.getuid()
        return is_ours and path.read_bytes()[: len(_HOLDER)] == _HOLDER.encode()
    return False


def _is_file(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def _is_own_file(status: os.stat_result) -> bool:
    """Whether it is a regular file, and no other name of one."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink <= 1


def remove_remnant(folder: Path) -> None:
    """Remove a folder whose writer has ended; one that may still be written to stays, as does a link."""
    lock = folder / LOCK_FILE
    if folder.is_symlink() or lock.is_symlink():
        return
    with suppress(FolderInUse, OSError):
        # Its writer is about to lock it, or wrote before there were locks.
        if not lock.exists() or not lock.stat().st_size:
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
            return
        with locked(folder, is_new=False) as has_locks:
            if has_locks:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming_full_disks(
    what: str,
    folder: Path,
    num_bytes: int | None = None,
    partial: Path | None = None,
    left: str = "nothing",
) -> Iterator[None]:
    """Say in a line that a disk is full or cannot be written to, where something is written to a folder.

    Args:
        what: What is written.
        folder: Where to; it may be gone when that has failed.
        num_bytes: How large it becomes, where that is known or can be estimated.
        partial: File or folder to remove when writing has failed, before it is counted what is free.
        left: What is left behind.

    Raises:
        FullDiskError: The disk is full, read-only, or a quota or a size limit is met.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        if partial is not None:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise FullDiskError(
            f"cannot write {what} to {str(folder)!r}: {room(folder, num_bytes)} ({error.strerror or error}); "
            f"{left} is left behind"
        ) from error


@contextmanager
def numbering_errors() -> Iterator[None]:
    """Around what NumPy writes: its errors have no number, and those of writing are of full disks."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {error}") from error
