"""Reads nuScenes' JSON tables record by record.

The tables of v1.0-trainval hold 2.6 million sample_data and ego_pose records, most of them of cameras and
radars. Reading them as a stream keeps only what the caller keeps, and hashes the bytes on the way.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpq_train.common.errors import UserError

TABLES: tuple[str, ...] = (
    "category",
    "attribute",
    "sensor",
    "calibrated_sensor",
    "scene",
    "sample",
    "sample_data",
    "ego_pose",
    "instance",
    "sample_annotation",
)
"""The tables the index is made of, in the order in which they are read."""

Record = dict[str, Any]

_CHUNK_BYTES = 1 << 22
_BETWEEN_RECORDS = re.compile(r"[\s,]*")


class TableReader:
    """The tables of one version of a data set, read once each, in the order of `TABLES`.

    Args:
        folder: the folder that holds the tables, such as `<root>/v1.0-trainval`.
        on_bytes: called with the number of bytes just read, for a progress bar.
    """

    def __init__(self, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self._folder = folder
        self._on_bytes = on_bytes
        self._digests: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the contents of all tables, whatever folder they lie in.

        It is there when every table has been read to its end.
        """
        lines = "\n".join(f"{name} {self._digests[name]}" for name in TABLES)
        return hashlib.sha256(lines.encode()).hexdigest()

    def records(self, table: str) -> Iterator[Record]:
        """Yields the table's records in file order.

        Raises:
            UserError: the file is no JSON list of records.
        """
        path = self._folder / f"{table}.json"
        digest = hashlib.sha256()
        try:
            yield from _iterate_list(self._chunks(path, digest))
        except ValueError as error:
            raise UserError(
                f"table {path} is damaged: expected a JSON list of records, found {error}"
            ) from error
        self._digests[table] = digest.hexdigest()

    def _chunks(self, path: Path, digest: hashlib._Hash) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with path.open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                digest.update(block)
                self._on_bytes(len(block))
                yield decoder.decode(block)
        yield decoder.decode(b"", final=True)


def _iterate_list(chunks: Iterator[str]) -> Iterator[Record]:
    """Yields the objects of one JSON list that arrives in pieces.

    Raises:
        ValueError: the text is not such a list.
    """
    decode = json.JSONDecoder().raw_decode
    text = next(chunks).lstrip()
    if not text.startswith("["):
        raise ValueError(f"{text[:20]!r} at its start")
    position = 1
    while True:
        start = _skip(text, position)
        if text[start : start + 1] == "]":
            for _ in chunks:  # what follows the list still belongs to the fingerprint
                pass
            return
        try:
            record, position = decode(text, start)
        except ValueError:
            text, position = _extend(text[start:], chunks), 0
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{record!r} where a record should be")
        yield record


def _skip(text: str, position: int) -> int:
    between = _BETWEEN_RECORDS.match(text, position)
    assert between is not None  # the pattern matches the empty string
    return between.end()


def _extend(rest: str, chunks: Iterator[str]) -> str:
    """Appends the next piece to an unfinished record.

    Raises:
        ValueError: nothing follows, or a whole piece has not finished it, which no record of nuScenes needs.
    """
    for chunk in chunks if len(rest) < _CHUNK_BYTES else ():
        if chunk:
            return rest + chunk
    raise ValueError(f"an unfinished record that starts with {rest[:60]!r}")
