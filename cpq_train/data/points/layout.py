"""How many bytes a point of a raw file has, told by the bytes themselves, in whatever order the points are.

Bytes of one column are alike: sign and exponent of a coordinate take few values, a ring number is all zeros
but for a few bits. Read by its true width, each byte of a point has a distribution of its own; read by
another, the columns' distributions are mixed, and the entropy of a byte, summed over the places in a point,
goes up. Real and simulated clouds lose 0.09 bits a byte and more by any false width.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.points.format import WIDTHS

Bytes = NDArray[np.uint8]
Float64 = NDArray[np.float64]

SIZES: Final = tuple(sorted({width * num_bytes for width in WIDTHS for num_bytes in (4, 8)}))
"""Bytes of a point of 3 to 8 columns of float32 or float64."""

MIN_BYTES: Final = 32768
"""Fewer say too little: 500 points of the largest size."""

_MIN_POINTS: Final = 2000
"""Of a phase: in a small part of a turn the beams differ more."""

_SAMPLE_BYTES: Final = 2**18
_CLEARLY: Final = 0.05
"""Bits a byte: about half of what the least false width of a real cloud costs."""

_CLEARLY_BY_PHASE: Final = 0.35
"""Bits a byte of x and y, where every second, third, ... point is told apart. Beams that fire in turn differ
in height and ring, and little in the low bits of x and y: 0.3 was the most, columns that are others 0.44."""


def better_size(content: Bytes, record: np.dtype[Any]) -> int | None:
    """The size of a point that a raw file clearly has, if it is another one.

    Args:
        content: The file.
        record: A point, as it is said, with fields x and y.

    Returns:
        One of `SIZES`; None where nothing speaks against the given one, or the file is too small to say.
    """
    if len(content) < MIN_BYTES:
        return None
    sample = _sample(content, record.itemsize)
    bits = {size: float(_entropy(_table(sample, size)).mean()) for size in {*SIZES, record.itemsize}}

    def beats(other: int, one: np.dtype[Any]) -> bool:
        if other % one.itemsize:
            return bits[one.itemsize] - bits[other] > _CLEARLY
        return other > one.itemsize and _gain_by_phase(sample, one, other // one.itemsize) > _CLEARLY_BY_PHASE

    unbeaten = (one for one in SIZES if not any(beats(other, _usual_record(one)) for other in SIZES))
    best = next(unbeaten, None)
    return best if best is not None and beats(best, record) else None


def _usual_record(size: int) -> np.dtype[Any]:
    return np.dtype([("x", "<f4"), ("y", "<f4"), ("others", f"V{size - 8}")])


def _sample(content: Bytes, size: int) -> Bytes:
    """Some of a file, evenly spread, in blocks of whole points of every size."""
    block = math.lcm(*SIZES, size)
    num_blocks = len(content) // block
    if not num_blocks or block > _SAMPLE_BYTES:
        return content[:_SAMPLE_BYTES]
    chosen = np.linspace(0, num_blocks - 1, min(num_blocks, _SAMPLE_BYTES // block)).astype(np.int64)
    return content[: num_blocks * block].reshape(num_blocks, block)[chosen].ravel()


def _table(content: Bytes, size: int) -> Bytes:
    num_points = len(content) // size
    return content[: num_points * size].reshape(num_points, size)


def _entropy(table: Bytes) -> Float64:
    """Bits (size,) that each byte of points (P, size) holds; the bias of few is taken off (Miller, Madow)."""
    num_points, size = table.shape
    cells = table + 256 * np.arange(size, dtype=np.int32)
    counts = np.bincount(cells.ravel(), minlength=256 * size).reshape(size, 256)
    shares = counts / num_points
    bits = -(shares * np.log2(np.where(counts, shares, 1.0))).sum(axis=1)
    entropy: Float64 = bits + (np.count_nonzero(counts, axis=1) - 1) / (2 * num_points * math.log(2))
    return entropy


def _gain_by_phase(content: Bytes, record: np.dtype[Any], num_phases: int) -> float:
    """Bits a byte of x and y that are saved where every second, third, ... point has columns of its own.

    Points without a return are left out: where they come in turn, they are no other columns.
    """
    points = _table(content, record.itemsize).view(record)[:, 0]
    position = [np.ascontiguousarray(points[name]) for name in ("x", "y")]
    with np.errstate(invalid="ignore"):  # of other columns, bytes may be signaling NaN
        has_return = np.isfinite(position).all(axis=0) & np.any(position, axis=0)
    places = np.concatenate([one.view(np.uint8).reshape(len(points), -1) for one in position], axis=1)
    phases = [places[start::num_phases][has_return[start::num_phases]] for start in range(num_phases)]
    if min(map(len, phases)) < _MIN_POINTS:
        return 0.0
    together = _entropy(np.concatenate(phases))
    apart = np.average([_entropy(phase) for phase in phases], axis=0, weights=list(map(len, phases)))
    says_something = together > _CLEARLY  # float32 numbers in float64 end with zeros
    return float((together - apart)[says_something].mean()) if says_something.any() else 0.0
