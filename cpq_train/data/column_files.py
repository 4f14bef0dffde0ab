"""Folders of memory-mapped columns, with checksums: what is damaged is never read as if it were whole.

Beside the columns lies `contents.json`, written last: their types, shapes and checksums. A column whose file
has changed since is read and compared when the folder is opened, every other one when it is first used, so
that opening takes no pass over the files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cpq_train.common.documents import read_json
from cpq_train.common.errors import LoadingError
from cpq_train.common.schema import Count, keys, list_of, validated
from cpq_train.data.derived import discard

CONTENTS_FILE = "contents.json"

Columns = dict[str, NDArray[Any]]

_COLUMN = keys({"dtype": str, "shape": list_of(Count), "crc32": Count | None})


Unchecked = tuple[Path, NDArray[Any], int | None]
"""File, column and checksum; None where whoever reads it compares it piece by piece."""


class DamageError(LoadingError):
    """A column that is not what was written."""


class CheckedColumns:
    """For classes whose attributes are such columns: each is compared with its checksum when first used."""

    _unchecked: Mapping[str, Unchecked]
    """File, column and checksum by name, of an object that was made of files."""

    if not TYPE_CHECKING:  # it would hide misspelt attributes

        def __getattr__(self, name: str) -> NDArray[Any]:
            unchecked = self.__dict__.get("_unchecked", {})
            if name not in unchecked:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            file, column, _ = unchecked[name]
            try:
                _check(*unchecked[name])
            except DamageError as error:
                discard(file.parent)
                raise DamageError(f"{error}; its folder is removed, start again to make it anew") from error
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
        np.save(folder / f"{name}.npy", column, allow_pickle=False)
    of_columns = {
        name: {"dtype": column.dtype.str, "shape": column.shape, "crc32": checksum(column)}
        for name, column in columns.items()
    } | {
        name: {"dtype": dtype.str, "shape": shape, "crc32": None}
        for name, (dtype, shape) in in_pieces.items()
    }
    contents = {"meta": dict(meta), "columns": of_columns}
    (folder / CONTENTS_FILE).write_text(json.dumps({"crc32": _crc32(contents), "contents": contents}))


def open_columns(folder: Path, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Unchecked]]:
    """Maps the columns of a folder, for an object of `CheckedColumns`.

    Returns:
        What was kept beside them, and the columns of these names.

    Raises:
        UserError: something is missing or damaged.
    """
    document = read_json(folder / CONTENTS_FILE, "file")
    contents_kind = keys({"meta": dict[str, Any], "columns": keys(dict.fromkeys(names, _COLUMN))})
    kind: TypeAdapter[Any] = TypeAdapter(keys({"crc32": Count, "contents": contents_kind}))
    contents = validated(kind, document, str(folder / CONTENTS_FILE))["contents"]
    if document["crc32"] != _crc32(contents):
        raise DamageError(f"{folder / CONTENTS_FILE} is damaged: its checksum is another")
    columns, written_ns = {}, (folder / CONTENTS_FILE).stat().st_ctime_ns
    for name in names:
        column = contents["columns"][name]
        file = folder / f"{name}.npy"
        columns[name] = (file, _mapped(file, column["dtype"], column["shape"]), column["crc32"])
        if file.stat().st_ctime_ns > written_ns:
            _check(*columns[name])
    return contents["meta"], columns


def _check(file: Path, column: NDArray[Any], crc32: int | None) -> None:
    """Compares a column with its checksum.

    Raises:
        DamageError: it differs.
    """
    if crc32 is not None and checksum(column) != crc32:
        raise DamageError(f"{file} is damaged: its checksum is another")


def _mapped(file: Path, dtype: str, shape: list[int]) -> NDArray[Any]:
    """Maps the end of a file, of whatever length its header is.

    Raises:
        DamageError: it is missing or too short.
    """
    num_bytes = np.dtype(dtype).itemsize * prod(shape)
    try:
        offset = file.stat().st_size - num_bytes
        if offset <= 0:
            raise DamageError(f"{file} is damaged: it is cut short")
        return np.memmap(file, dtype=dtype, mode="r", shape=tuple(shape), offset=offset)
    except OSError as error:
        raise DamageError(f"{file} is not readable: {error.strerror}") from error


def _crc32(contents: Any) -> int:
    return zlib.crc32(json.dumps(contents, sort_keys=True).encode())
