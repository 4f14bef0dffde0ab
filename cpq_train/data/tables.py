"""Reads nuScenes' JSON tables record by record.

The tables of v1.0-trainval hold 2.6 million sample_data and ego_pose records, most of them of cameras and
radars. Reading them as a stream keeps only what the caller keeps, and hashes the bytes on the way.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpq_train.common.documents import without_duplicates
from cpq_train.common.errors import UserError, shown

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

_DECODER = json.JSONDecoder()
_STRICT_DECODER = json.JSONDecoder(object_pairs_hook=without_duplicates)
_CHUNK_BYTES = 1 << 22
_BETWEEN_RECORDS = re.compile(r"[\s,]*")


class Table(NamedTuple):
    """A table, as the file system knows it; times in ns."""

    name: str
    num_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @property
    def size_and_time(self) -> tuple[str, int, int]:
        """What a copy has too."""
        return self.name, self.num_bytes, self.modified_ns

    @property
    def identity(self) -> tuple[str, int, int]:
        """What a copy, and the same table changed in whatever way, does not have."""
        return self.name, self.inode, self.changed_ns


def find_tables(root: Path, version: str) -> list[Table]:
    """The tables of a data set.

    Raises:
        UserError: the root, the version or a table does not exist.
    """
    if not root.is_dir():
        raise UserError(
            f"data root {str(root)!r} is no folder: expected one that holds {version}/ and samples/"
        )
    if not version or not (root / version).is_dir():
        versions = ", ".join(sorted(path.parent.name for path in root.glob("*/sample_annotation.json")))
        raise UserError(
            f"data version {version!r} is not in {root}: found {versions or 'no folder of tables'}"
        )
    tables = []
    for table in TABLES:
        path = root / version / f"{table}.json"
        if not path.is_file():
            raise UserError(
                f"table {path} is missing: a data set of version {version} has {', '.join(TABLES)}"
            )
        status = path.stat()
        times_ns = status.st_mtime_ns, status.st_ctime_ns
        tables.append(Table(table, status.st_size, *times_ns, status.st_ino))
    return tables


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
        return _of_all(self._digests)

    def records(self, table: str) -> Iterator[Record]:
        """Yields the table's records in file order.

        Raises:
            UserError: the file is no JSON list of records, or is not readable.
        """
        path = self._folder / f"{table}.json"
        digest, num_colons = hashlib.sha256(), 0

        def note(block: bytes) -> None:
            nonlocal num_colons
            digest.update(block)
            num_colons += np.count_nonzero(np.frombuffer(block, dtype=np.uint8) == ord(":"))
            self._on_bytes(len(block))

        try:
            num_keys = yield from _iterate_list(_chunks(path, note), _DECODER)
            if num_colons > num_keys:  # texts hold some, or a key is there twice, which costs time to tell
                for _ in _iterate_list(_chunks(path, lambda _: None), _STRICT_DECODER):
                    pass
        except (ValueError, RecursionError) as error:
            found = "one that is nested too deep" if isinstance(error, RecursionError) else error
            raise UserError(
                f"table {path} is damaged: expected a JSON list of records, found {found}"
            ) from error
        except OSError as error:
            raise UserError(f"table {path} is not readable: {error.strerror}") from error
        self._digests[table] = digest.hexdigest()


def fingerprint(folder: Path, on_bytes: Callable[[int], None]) -> str:
    """As `TableReader.fingerprint`, of tables whose records nobody needs.

    Args:
        folder: the folder that holds the tables.
        on_bytes: as that of `TableReader`.

    Raises:
        UserError: one is not readable.
    """
    digests = {}
    for table in TABLES:
        path, digest = folder / f"{table}.json", hashlib.sha256()
        try:
            for block in _blocks(path):
                digest.update(block)
                on_bytes(len(block))
        except OSError as error:
            raise UserError(f"table {path} is not readable: {error.strerror}") from error
        digests[table] = digest.hexdigest()
    return _of_all(digests)


def _of_all(digests: Mapping[str, str]) -> str:
    lines = "\n".join(f"{name} {digests[name]}" for name in TABLES)
    return hashlib.sha256(lines.encode()).hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_CHUNK_BYTES):
            yield block


def _chunks(path: Path, on_block: Callable[[bytes], None]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in _blocks(path):
        on_block(block)
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _iterate_list(chunks: Iterator[str], decoder: json.JSONDecoder) -> Generator[Record, None, int]:
    """Yields the objects of one JSON list that arrives in pieces, and returns how many keys they have.

    Raises:
        ValueError: the text is not such a list.
    """
    decode, between, num_keys = decoder.raw_decode, _BETWEEN_RECORDS.match, 0
    text = next(chunks).lstrip()
    if not text.startswith("["):
        raise ValueError(f"{text[:20]!r} at its start")
    position = 1
    while True:
        start = between(text, position).end()  # type: ignore[union-attr]  # it matches the empty string
        if text[start : start + 1] == "]":
            _check_end(text[start + 1 :], chunks)
            return num_keys
        try:
            record, position = decode(text, start)
        except json.JSONDecodeError:
            text, position = _extend(text[start:], chunks), 0
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{shown(record)} where a record should be")
        num_keys += len(record)
        yield record


def _check_end(rest: str, chunks: Iterator[str]) -> None:
    """Reads a file to its end, as all of it belongs to the fingerprint.

    Raises:
        ValueError: something follows the list.
    """
    for text in (rest, *chunks):
        if text.strip():
            raise ValueError(f"{shown(text.strip()[:20])} behind the list")


def _extend(rest: str, chunks: Iterator[str]) -> str:
    """Appends the next piece to an unfinished record.

    Raises:
        ValueError: nothing follows, or a whole piece has not finished it, which no record of nuScenes needs.
    """
    for chunk in chunks if len(rest) < _CHUNK_BYTES else ():
        if chunk:
            return rest + chunk
    raise ValueError(f"an unfinished record that starts with {rest[:60]!r}")
