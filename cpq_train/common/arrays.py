"""Archives of NumPy arrays: nothing is unpacked or allocated before it is known to be what it says."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, Protocol
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cpq_train.common.errors import UserError, shown
from cpq_train.common.files import check_regular

Arrays = dict[str, NDArray[Any]]

_MAX_RATIO: Final = 100
"""Bytes of arrays for each byte of their archive: those of a validation split come to 5."""

_FREE_BYTES: Final = 64 * 2**20
"""So much an archive may unpack to whatever its size: columns of one value are packed a thousandfold."""

_MAX_CODE_POINT: Final = 0x10FFFF

_MAX_FLOAT_BYTES: Final = 8
_KINDS: Final = {
    "i": "whole numbers",
    "u": "whole numbers from 0 on",
    "f": "floating-point numbers",
    "U": "texts",
    "S": "texts in bytes",
    "b": "flags",
}


class Column(NamedTuple):
    """What an array should be.

    Attributes:
        kind: Of its dtype: i, u, f, U, S or b; where `num_bytes` is None, i may be unsigned too.
        shape: A number, or a letter for a length that is the same wherever the letter stands; N+1 is one
            more than N.
        num_bytes: Of each number; None for any.
    """

    kind: str
    shape: tuple[str | int, ...]
    num_bytes: int | None = None


class Described(Protocol):
    """An array, or what is said of one."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""


def read_npz(path: Path, what: str, names: Collection[str] | None = None) -> Arrays:
    """The arrays of an .npz archive by their names.

    Args:
        path: The archive.
        what: What it is, for the message.
        names: Only these, as far as they are there.

    Raises:
        UserError: It is missing, no regular file, damaged, holds Python objects or texts that are none, or
            one of its arrays says that it is larger or smaller than what the archive holds of it.
    """
    check_regular(path, what)
    try:
        with ZipFile(path) as archive:
            return _arrays(archive, path.stat().st_size, names)
    except _Unfit as error:
        reason = str(error)
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__)[:_MAX_CHARACTERS]
    raise UserError(f"{what} {str(path)!r} is not a readable .npz archive: {reason}")


_MAX_CHARACTERS: Final = 200
"""Of what zipfile says: it repeats names, which may have 65,535."""

_DAMAGED: Final = (
    *(OSError, EOFError, ValueError, OverflowError, RuntimeError, NotImplementedError),
    *(BadZipFile, zlib.error, struct.error),
)
"""What zipfile and NumPy raise where an archive is cut or has flipped bits."""


class _Unfit(Exception):
    """What is wrong with an archive, in words."""


def _arrays(archive: ZipFile, num_bytes: int, wanted: Collection[str] | None) -> Arrays:
    members = archive.infolist()
    unpacked, most = sum(member.file_size for member in members), max(_FREE_BYTES, _MAX_RATIO * num_bytes)
    if unpacked > most:
        raise _Unfit(f"it unpacks to {unpacked} bytes; accepted: {most} for a file of {num_bytes} bytes")
    if any(member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for member in members):
        raise _Unfit("it is packed otherwise than NumPy does; accepted: stored, deflated")
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(set(names)) < len(names):
        raise _Unfit(f"arrays {shown(names)}; accepted: each name once")
    stored = dict(zip(names, members, strict=True))
    return {name: _array(archive, stored[name]) for name in names if wanted is None or name in wanted}


def parse_npy(stream: IO[bytes], num_bytes: int) -> NDArray[Any]:
    """The array of an .npy file, which may be of records.

    Args:
        stream: The file, at its start.
        num_bytes: Its size.

    Raises:
        UserError: It is damaged, holds Python objects, or says that it is larger or smaller than it is.
    """
    try:
        _check_header(stream, "in it", num_bytes)
        stream.seek(0)
        array: NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    except _Unfit as error:
        reason = str(error)
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__)[:_MAX_CHARACTERS]
    else:
        return array
    raise UserError(f"it is not a readable .npy array: {reason}")


def _array(archive: ZipFile, member: ZipInfo) -> NDArray[Any]:
    with archive.open(member) as stream:
        _check_header(stream, repr(member.filename), member.file_size)
    with archive.open(member) as stream:
        array: NDArray[Any] = npy.read_array(stream, allow_pickle=False)
        stream.read(1)  # at its end zipfile compares the checksum
    if array.dtype.kind == "U" and array.size and _code_points(array).max() > _MAX_CODE_POINT:
        raise _Unfit(f"array {member.filename!r} holds texts that are none")
    return array


def _check_header(stream: IO[bytes], name: str, num_bytes: int) -> None:
    """See that the array fills its file, or its member of an archive."""
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(stream))
    if read is None:
        raise _Unfit(f"array {name} is of an unknown version; accepted: 1.0, 2.0")
    try:
        shape, _, dtype = read(stream)
    except Exception as error:  # a header is a Python literal: what parses it may raise anything
        raise _Unfit(f"array {name} has no readable header") from error
    where = f"array {name} of shape {shown(shape)} and dtype {shown(dtype.str)}"
    if dtype.hasobject or dtype.itemsize <= 0 or min(shape, default=0) < 0:
        raise _Unfit(f"{where}; accepted: lengths from 0 on of numbers, flags or texts")
    needed, held = math.prod(shape) * dtype.itemsize, num_bytes - stream.tell()
    if needed != held:
        raise _Unfit(f"{where} needs {needed} bytes and holds {held}")


def _code_points(texts: NDArray[Any]) -> NDArray[Any]:
    flat = np.ascontiguousarray(texts).ravel()
    return flat.view(texts.dtype.str[0] + "u4")


def check_columns(
    arrays: Mapping[str, Described], columns: Mapping[str, Column], where: str
) -> dict[str, int]:
    """See that arrays are there, of their kind, and as long as one another.

    Args:
        arrays: By name; more than `columns` has are passed over.
        columns: What they should be.
        where: The file, for the message.

    Returns:
        The length that each letter stands for.

    Raises:
        UserError: One is missing, or of another kind or shape.
    """
    missing = sorted(columns.keys() - arrays.keys())
    if missing:
        raise UserError(f"{where}: columns {missing} are missing; accepted: {', '.join(columns)}")
    lengths: dict[str, int] = {}
    for name, column in columns.items():
        dtype, shape = arrays[name].dtype, arrays[name].shape
        if not _is_of_kind(dtype, column):
            accepted = _KINDS[column.kind]
            accepted += f" of {column.num_bytes} bytes" if column.num_bytes else ""
            raise UserError(f"{where}: array {name} holds {shown(dtype.str)}; accepted: {accepted}")
        fits = len(shape) == len(column.shape) and all(
            _is_long(length, wanted, lengths) for wanted, length in zip(column.shape, shape, strict=True)
        )
        if not fits:
            accepted = ", ".join(str(lengths.get(str(part), part)) for part in column.shape)
            raise UserError(f"{where}: array {name} has shape {shape}; accepted: ({accepted})")
    return lengths


def _is_of_kind(dtype: np.dtype[Any], column: Column) -> bool:
    is_wide = dtype.kind == "f" and dtype.itemsize > _MAX_FLOAT_BYTES
    if column.num_bytes is not None:
        return (dtype.kind, dtype.itemsize) == (column.kind, column.num_bytes)
    return dtype.kind.replace("u", "i") == column.kind and dtype.itemsize > 0 and not is_wide


def _is_long(length: int, wanted: str | int, lengths: dict[str, int]) -> bool:
    """Whether a length is the wanted one; what a letter stands for is set by the first that has it."""
    if isinstance(wanted, int):
        return length == wanted
    letter = wanted.removesuffix("+1")
    more = int(letter != wanted)
    return length >= more and length == lengths.setdefault(letter, length - more) + more


def check_values(array: NDArray[Any], least: float, most: float, where: str, unknown: bool = False) -> None:
    """See that numbers lie within bounds.

    Args:
        array: Numbers of any shape.
        least: The least accepted.
        most: The greatest accepted.
        where: File and array, for the message.
        unknown: NaN is accepted too.

    Raises:
        UserError: One does not; names its place.
    """
    good = (array >= least) & (array <= most)
    if unknown:
        good |= np.isnan(array)
    if not good.all():
        place = tuple(np.argwhere(~good)[0].tolist())
        nan = ", or NaN" if unknown else ""
        raise UserError(f"{where}{list(place)} is {array[place]}; accepted: {least:g} to {most:g}{nan}")
