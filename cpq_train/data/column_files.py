"""Folders of memory-mapped columns, with checksums: what is damaged is never read as if it were whole.

Beside the columns lies `contents.json`, written last: their types, shapes and checksums. A column whose file
has changed since is read and compared when the folder is opened, every other one when it is first used, so
that opening takes no pass over the files.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cpq_train.common.arrays import Column, check_columns, check_values
from cpq_train.common.documents import checksum_of, read_json
from cpq_train.common.errors import LoadingError, UserError, shown
from cpq_train.common.folders import numbering_errors
from cpq_train.common.schema import Count, keys, list_of, validated
from cpq_train.data.derived import discard

CONTENTS_FILE = "contents.json"

Columns = dict[str, NDArray[Any]]

_DTYPE = re.compile(r"[<|][biufS][0-9]{1,9}")

_COLUMN = keys({"dtype": str, "shape": list_of(Count), "crc32": Count | None})


class DamageError(LoadingError):
    """A column that is not what was written."""


class Layout(NamedTuple):
    """What the columns of a folder are: it may be a stranger's, whose checksums fit what he likes.

    Attributes:
        columns: Types and shapes.
        ranges: The least of the numbers of a column, and what they stay below: a number, or the letter of a
            length.
        offsets: Columns that divide other ones; the letter of the length that they lead to.
        in_pieces: Columns without a checksum, which whoever reads them compares piece by piece.
    """

    columns: Mapping[str, Column]
    ranges: Mapping[str, tuple[int, str | int]]
    offsets: Mapping[str, str]
    in_pieces: Collection[str] = ()


class Unchecked(NamedTuple):
    """A column that is compared when it is first used.

    Attributes:
        file: Its file.
        column: The column.
        crc32: Its checksum; None where whoever reads it compares it piece by piece.
        below: The least of its numbers, and what they stay below.
        end: The last of its numbers, which rise from 0.
    """

    file: Path
    column: NDArray[Any]
    crc32: int | None
    below: tuple[int, int] | None
    end: int | None

    def check(self) -> None:
        """Compare it.

        Raises:
            DamageError: It is not what was written, or was never a column of its kind.
        """
        if self.crc32 is not None and checksum(self.column) != self.crc32:
            raise DamageError(f"{self.file} is damaged: its checksum is another")
        try:
            self._check_values()
        except UserError as error:
            raise DamageError(f"{self.file} is damaged: {error}") from error

    def _check_values(self) -> None:
        column = self.column
        if self.below is not None:
            check_values(column, self.below[0], self.below[1] - 1, "number ")
        if self.end is not None and not (
            column[0] == 0 and column[-1] == self.end and (column[1:] >= column[:-1]).all()
        ):
            raise UserError(f"its numbers do not rise from 0 to {self.end}")
        if column.dtype.kind == "S":
            letters = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), column.itemsize)
            try:
                str(np.pad(letters, ((0, 0), (0, 1))).data, "utf-8")
            except UnicodeDecodeError as error:
                raise UserError("it holds texts that are no UTF-8") from error


class _Said(NamedTuple):
    """What is said of a column."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class CheckedColumns:
    """For classes whose attributes are such columns: each is compared with its checksum when first used."""

    _remedy: str
    """What helps where one is damaged and its folder has been removed."""

    _unchecked: Mapping[str, Unchecked]
    """File, column and checksum by name, of an object that was made of files."""

    if not TYPE_CHECKING:  # it would hide misspelt attributes

        def __getattr__(self, name: str) -> NDArray[Any]:
            unchecked = self.__dict__.get("_unchecked", {})
            if name not in unchecked:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            file, column = unchecked[name][:2]
            try:
                unchecked[name].check()
            except DamageError as error:
                discard(file.parent)
                raise DamageError(f"{error}; its folder is removed, {self._remedy}") from error
            self.__dict__[name] = column
            return column


def checksum(column: NDArray[Any]) -> int:
    """CRC-32 of the contents of an array."""
    return zlib.crc32(np.ascontiguousarray(column).data)


def write_columns(
    folder: Path,
    columns: Columns,
    meta: Mapping[str, Any],
    in_pieces: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]] = MappingProxyType({}),
) -> None:
    """Writes columns into a folder, and what is to be known of them.

    Args:
        folder: the folder.
        columns: by name.
        meta: plain values to keep beside them.
        in_pieces: type and shape of columns that are there already, and that whoever reads them compares
            piece by piece.
    """
    for name, column in columns.items():
        with numbering_errors():
            np.save(folder / f"{name}.npy", column, allow_pickle=False)
    of_columns = {
        name: {"dtype": column.dtype.str, "shape": column.shape, "crc32": checksum(column)}
        for name, column in columns.items()
    } | {
        name: {"dtype": dtype.str, "shape": shape, "crc32": None}
        for name, (dtype, shape) in in_pieces.items()
    }
    contents = {"meta": dict(meta), "columns": of_columns}
    (folder / CONTENTS_FILE).write_text(json.dumps({"crc32": checksum_of(contents), "contents": contents}))


def open_columns(
    folder: Path, layout: Layout, known: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, Unchecked]]:
    """Maps the columns of a folder, for an object of `CheckedColumns`.

    Args:
        folder: the folder.
        layout: what they should be.
        known: lengths of `layout` that no column has.

    Returns:
        What was kept beside them, and the columns.

    Raises:
        UserError: something is missing or damaged.
    """
    path, names = folder / CONTENTS_FILE, layout.columns
    document = read_json(path, "file")
    contents_kind = keys({"meta": dict[str, Any], "columns": keys(dict.fromkeys(names, _COLUMN))})
    kind: TypeAdapter[Any] = TypeAdapter(keys({"crc32": Count, "contents": contents_kind}))
    contents = validated(kind, document, str(path))["contents"]
    if document["crc32"] != checksum_of(contents):
        raise DamageError(f"{path} is damaged: its checksum is another")
    said = {name: _said(contents["columns"][name], f"{path}: column {name}") for name in names}
    lengths = {**known, **check_columns(said, layout.columns, str(path))}
    columns, written_ns, is_older = {}, path.stat().st_ctime_ns, False
    for name in names:
        crc32 = contents["columns"][name]["crc32"]
        if (crc32 is None) != (name in layout.in_pieces):
            raise DamageError(f"{path} is damaged: the checksum of {name} is {crc32}")
        file = folder / f"{name}.npy"
        columns[name] = Unchecked(
            file, _mapped(file, said[name]), crc32, _range(name, layout, lengths), _end(name, layout, lengths)
        )
        if file.stat().st_ctime_ns > written_ns:
            is_older = True
            columns[name].check()
    if is_older:
        with suppress(OSError):  # where it cannot be written, every opening compares again
            os.utime(path, follow_symlinks=False)
    return contents["meta"], columns


def _range(name: str, layout: Layout, lengths: Mapping[str, int]) -> tuple[int, int] | None:
    if name not in layout.ranges:
        return None
    least, below = layout.ranges[name]
    if isinstance(below, int):
        return least, below
    letter = below.removesuffix("+1")
    return least, lengths[letter] + (letter != below)


def _end(name: str, layout: Layout, lengths: Mapping[str, int]) -> int | None:
    return lengths[layout.offsets[name]] if name in layout.offsets else None


def _said(column: Mapping[str, Any], where: str) -> _Said:
    """What `contents.json` says of a column.

    Raises:
        DamageError: its type is none.
    """
    with suppress(TypeError):
        if _DTYPE.fullmatch(column["dtype"]):
            return _Said(np.dtype(column["dtype"]), tuple(column["shape"]))
    raise DamageError(f"{where} has dtype {shown(column['dtype'])}")


def _mapped(file: Path, said: _Said) -> NDArray[Any]:
    """Maps the end of a file, of whatever length its header is.

    Raises:
        DamageError: it is missing or too short.
    """
    try:
        offset = file.stat().st_size - said.dtype.itemsize * prod(said.shape)
        if offset <= 0:
            raise DamageError(f"{file} is damaged: it is cut short")
        return np.memmap(file, dtype=said.dtype, mode="r", shape=said.shape, offset=offset)
    except OSError as error:
        raise DamageError(f"{file} is not readable: {error.strerror}") from error
