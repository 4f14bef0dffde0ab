"""Reads PCD files, the format of the Point Cloud Library: ascii, binary and binary_compressed (LZF).

Files may be a stranger's: nothing is allocated before the file is known to hold so much.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Fields = dict[str, NDArray[Any]]

_KINDS: Final = {"F": "f", "I": "i", "U": "u"}
_SIZES: Final = {"F": (4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8)}
_NEEDED: Final = ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT", "POINTS", "DATA")
_MAX_HEADER_BYTES: Final = 65536
_PADDING: Final = "_"
"""Name of fields that fill gaps of a record in memory."""

_MAX_NUMBER_BYTES: Final = 64
_MAX_RATIO: Final = 100
"""Bytes that a byte of LZF can unpack to: three make 264."""


class PcdError(Exception):
    """What is wrong with a file, in words."""


class _Header(NamedTuple):
    """What a file says of itself."""

    names: list[str]
    dtypes: list[np.dtype[Any]]
    counts: list[int]
    num_points: int
    data: str
    num_bytes: int


def parse_pcd(content: bytes) -> Fields:
    """The fields of a file by name, each (P,), in the file's order; padding is left out.

    Args:
        content: The file.

    Raises:
        PcdError: It is no PCD file, cut, or has a field of several values.
    """
    header = _header(content)
    body = content[header.num_bytes :]
    parse = {"ascii": _ascii, "binary": _binary, "binary_compressed": _compressed}.get(header.data)
    if parse is None:
        raise PcdError(f"DATA is {header.data!r}; accepted: ascii, binary, binary_compressed")
    if not header.num_points:
        return {name: np.empty(0) for name in header.names if name != _PADDING}
    columns = parse(body, header)
    return {name: columns[i] for i, name in enumerate(header.names) if name != _PADDING}


def _header(content: bytes) -> _Header:
    said: dict[str, list[str]] = {}
    end = 0
    while "DATA" not in said:
        start, end = end, content.find(b"\n", end, _MAX_HEADER_BYTES) + 1
        if not end:
            raise PcdError("it has no header that ends with DATA, as a PCD file begins")
        words = content[start:end].decode("latin-1").split()
        if words and not words[0].startswith("#"):
            said[words[0]] = words[1:]
    if missing := [name for name in _NEEDED if not said.get(name)]:
        raise PcdError(f"its header has no {missing[0]}; accepted: {', '.join(_NEEDED)}")
    names = said["FIELDS"]
    sizes, counts = _numbers(said, "SIZE"), _numbers(said, "COUNT") if "COUNT" in said else [1] * len(names)
    if not len(names) == len(sizes) == len(said["TYPE"]) == len(counts):
        raise PcdError("FIELDS, SIZE, TYPE and COUNT of its header name different numbers of fields")
    dtypes = [_dtype(*field) for field in zip(names, said["TYPE"], sizes, strict=True)]
    for name, count in zip(names, counts, strict=True):
        if count < 1 or (name != _PADDING and (count > 1 or names.count(name) > 1)):
            raise PcdError(f"field {name!r} has {count} values a point or comes twice; accepted: one, once")
    width, height, num_points = (_numbers(said, name)[0] for name in ("WIDTH", "HEIGHT", "POINTS"))
    if width * height != num_points:
        raise PcdError(f"POINTS is {num_points}, WIDTH x HEIGHT {width} x {height}")
    return _Header(names, dtypes, counts, num_points, said["DATA"][0], end)


def _numbers(said: dict[str, list[str]], name: str) -> list[int]:
    for word in said[name]:
        if not (word.isascii() and word.isdigit() and len(word) <= 12):
            raise PcdError(f"{name} of its header is {word[:40]!r}; accepted: whole numbers")
    return [int(word) for word in said[name]]


def _dtype(name: str, kind: str, size: int) -> np.dtype[Any]:
    if size not in _SIZES.get(kind, ()):
        raise PcdError(f"field {name!r} is of TYPE {kind} and SIZE {size}; accepted: F 4 8, I and U 1 2 4 8")
    return np.dtype(f"<{_KINDS[kind]}{size}")


def _ascii(body: bytes, header: _Header) -> list[NDArray[Any]]:
    words, width = body.split(), sum(header.counts)
    if max(map(len, words), default=0) > _MAX_NUMBER_BYTES:
        raise PcdError(f"it holds a number of more than {_MAX_NUMBER_BYTES} characters")
    if len(words) != header.num_points * width:
        raise PcdError(f"it holds {len(words)} numbers; accepted: {header.num_points} x {width}")
    try:
        table = np.array(words, dtype=np.bytes_).astype(np.float64).reshape(-1, width)
    except ValueError as error:
        raise PcdError(f"it holds what is no number: {str(error)[:80]}") from error
    starts = np.cumsum([0, *header.counts[:-1]])
    return list(table.T[starts])


def _binary(body: bytes, header: _Header) -> list[NDArray[Any]]:
    sizes = [dtype.itemsize * count for dtype, count in zip(header.dtypes, header.counts, strict=True)]
    needed = sum(sizes) * header.num_points
    if len(body) < needed:
        raise PcdError(f"it is truncated: {len(body)} bytes of points; accepted: {needed}")
    rows = np.frombuffer(body, dtype=np.uint8, count=needed).reshape(header.num_points, -1)
    starts = np.cumsum([0, *sizes]).tolist()
    return [
        np.ascontiguousarray(rows[:, start : start + dtype.itemsize]).view(dtype).ravel()
        for dtype, start in zip(header.dtypes, starts, strict=False)
    ]


def _compressed(body: bytes, header: _Header) -> list[NDArray[Any]]:
    """Fields one after the other, packed as a whole."""
    lengths = [
        dtype.itemsize * count * header.num_points
        for dtype, count in zip(header.dtypes, header.counts, strict=True)
    ]
    if len(body) < 8:
        raise PcdError("it is truncated: no sizes of its packed points")
    packed, unpacked = np.frombuffer(body, dtype="<u4", count=2).tolist()
    if unpacked != sum(lengths) or packed > len(body) - 8 or unpacked > _MAX_RATIO * packed:
        raise PcdError(
            f"its points are {packed} bytes packed, {unpacked} unpacked; the file holds {len(body) - 8}, its "
            f"header names {sum(lengths)}"
        )
    raw = unpack_lzf(body[8 : 8 + packed], unpacked)
    starts = np.cumsum([0, *lengths]).tolist()
    return [
        np.frombuffer(raw, dtype=dtype, count=header.num_points * count, offset=start)[::count]
        for dtype, count, start in zip(header.dtypes, header.counts, starts, strict=False)
    ]


def unpack_lzf(packed: bytes, num_bytes: int) -> bytes:
    """Unpacks LZF.

    Args:
        packed: A byte below 32 says how many bytes follow as they are, less one; another one repeats bytes
            from before: three bits of length, which a further byte adds to where they are full, and thirteen
            of distance.
        num_bytes: How many bytes come out.

    Raises:
        PcdError: They do not.
    """
    out, at = bytearray(), 0
    try:
        while at < len(packed) and len(out) <= num_bytes:
            control = packed[at]
            at += 1
            if control < 32:
                out += packed[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += packed[at]
                at += 1
            start = len(out) - ((control & 31) << 8) - packed[at] - 1
            at += 1
            if start < 0:
                raise PcdError("its packed points are damaged: they point before their start")
            chunk = bytes(out[start : start + length + 2])
            out += (chunk * math.ceil((length + 2) / len(chunk)))[: length + 2]
    except IndexError as error:
        raise PcdError("its packed points are damaged: they end within a run") from error
    if len(out) != num_bytes:
        raise PcdError(f"its packed points are damaged: {len(out)} bytes; accepted: {num_bytes}")
    return bytes(out)
