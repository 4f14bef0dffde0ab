"""The zip archive that `torch.save` writes: its bytes compared with their checksums, its sizes bounded."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from cpq_train.common.errors import UserError

_START = b"PK\x03\x04"
"""How torch knows an archive."""

_TENSORS = "/data/"
"""In the name of every member that holds the numbers of tensors."""

_HEADER_BYTES = 30
"""Before the name of a member; the lengths of name and extra field stand at 26 and 28."""

_PICKLE = "data.pkl"
"""End of the name of the member that says what the tensors are; torch finds it in any case of letters."""


def is_archive(path: Path) -> bool:
    """Whether torch reads a file as an archive, and not as its older format."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def check_archive(path: Path, leave_tensors: bool = False) -> bool:
    """Compare every member with its checksum, which `torch.load` does not.

    Args:
        path: The file.
        leave_tensors: Check only what says what the tensors are, where these are left on the disk.

    Returns:
        Whether there was something to compare: older files of torch are no archive, and some have no
        checksums.

    Raises:
        UserError: The members are not stored as torch stores them.
        Exception: They differ, or it is no archive: of garbage, anything may be raised.
    """
    if not is_archive(path):
        if zipfile.is_zipfile(path):
            raise UserError(f"checkpoint {str(path)!r} is two files in one; accepted: as torch writes it")
        return False
    with zipfile.ZipFile(path) as file:
        members = file.infolist()
        _check_stored(members, path)
        if all(one.CRC == 0 for one in members):
            return False
        _compare(file, (one for one in members if not (leave_tensors and _TENSORS in one.filename)))
    return True


def _check_stored(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse members that are compressed, or that share bytes: few of both can stand for many."""
    is_compressed = any(one.compress_type != zipfile.ZIP_STORED for one in members)
    if is_compressed or sum(one.file_size for one in members) > path.stat().st_size:
        raise UserError(f"checkpoint {str(path)!r} is compressed; accepted: an archive as torch writes it")


def _compare(file: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> None:
    """Read members to their end; zipfile raises BadZipFile where a checksum differs."""
    for member in members:
        with file.open(member) as stream:
            while stream.read(1 << 20):
                pass


def pickles(path: Path) -> Iterator[io.BufferedReader]:
    """What is pickled in a file of `torch.save`: the members of an archive, or the file itself.

    Checksums are not compared: some files have none.
    """
    with path.open("rb") as file:
        if not is_archive(path):
            yield file
            return
        with zipfile.ZipFile(path) as archive:
            members = [one for one in archive.infolist() if one.filename.lower().endswith(_PICKLE)]
        for member in members:
            yield io.BufferedReader(io.BytesIO(_stored(file, member)))


def _stored(file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member that is not compressed, behind its header, name and extra field."""
    file.seek(member.header_offset)
    header = file.read(_HEADER_BYTES)
    num_named = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    file.seek(num_named, os.SEEK_CUR)
    return file.read(member.file_size)
