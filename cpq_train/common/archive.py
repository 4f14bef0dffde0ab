"""The zip archive that `torch.save` writes: its bytes compared with their checksums, its sizes bounded."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from cpq_train.common.errors import UserError

_TENSORS = "/data/"
"""In the name of every member that holds the numbers of tensors."""

_HEADER_BYTES = 30
"""Before the name of a member; the lengths of name and extra field stand at 26 and 28."""

_PICKLE = "data.pkl"
"""End of the name of the member that says what the tensors are."""


def check_archive(path: Path, what: str, leave_tensors: bool = False) -> bool:
    """Compare every member with its checksum, which `torch.load` does not.

    Args:
        path: The file.
        what: What it is, for the message, such as "checkpoint".
        leave_tensors: Check only what says what the tensors are, where these are left on the disk.

    Returns:
        Whether there was something to compare: older files of torch are no archive, and some have no
        checksums.

    Raises:
        UserError: They differ, or the members are not stored as torch stores them.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            _check_stored(members, path, what)
            if all(one.CRC == 0 for one in members):
                return False
            _compare(file, (one for one in members if not (leave_tensors and _TENSORS in one.filename)))
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"{what} {str(path)!r} is corrupt: {error}") from error
    return True


def _check_stored(members: list[zipfile.ZipInfo], path: Path, what: str) -> None:
    """Refuse members that are compressed, or that share bytes: few of both can stand for many."""
    is_compressed = any(one.compress_type != zipfile.ZIP_STORED for one in members)
    if is_compressed or sum(one.file_size for one in members) > path.stat().st_size:
        raise UserError(f"{what} {str(path)!r} is compressed; accepted: an archive as torch writes it")


def _compare(file: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> None:
    """Read members to their end; zipfile raises BadZipFile where a checksum differs."""
    for member in members:
        with file.open(member) as stream:
            while stream.read(1 << 20):
                pass


def pickled(path: Path) -> bytes:
    """The part of a file of `torch.save` that is pickled; all of one that is no archive.

    Its checksum is not compared: some files have none.
    """
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = [one for one in archive.infolist() if one.filename.endswith(_PICKLE)]
        return b"".join(_stored(file, one) for one in members)


def _stored(file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member that is not compressed, behind its header, name and extra field."""
    file.seek(member.header_offset)
    header = file.read(_HEADER_BYTES)
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
    return file.read(member.file_size)
