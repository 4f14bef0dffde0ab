"""The zip archive that `torch.save` writes: its bytes compared with their checksums, its sizes bounded."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

from cpq_train.common.errors import UserError

_TENSORS = "/data/"
"""In the name of every member that holds the numbers of tensors."""

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
        UserError: They differ, or the members are not stored as torch stores them: compressed ones could
            stand for more than the disk holds.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                raise UserError(f"{what} {str(path)!r} is compressed; accepted: as torch writes it")
            if all(one.CRC == 0 for one in members):
                return False
            _compare(file, (one for one in members if not (leave_tensors and _TENSORS in one.filename)))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{what} {str(path)!r} is corrupt: {error}") from error
    return True


def _compare(file: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> None:
    """Read members to their end; zipfile raises BadZipFile where a checksum differs."""
    for member in members:
        with file.open(member) as stream:
            while stream.read(1 << 20):
                pass


def pickled(path: Path) -> bytes:
    """The part of a file of `torch.save` that is pickled; all of one that is no archive."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as file:
        return b"".join(file.read(name) for name in file.namelist() if name.endswith(_PICKLE))
