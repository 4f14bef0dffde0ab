"""How many bytes a point of a raw file has, told by the bytes themselves, in whatever order the points are.

Bytes of one column are alike: sign and exponent of a coordinate take few values, a ring number is all zeros
but for a few bits. Read by its true width, each byte of a point has a distribution of its own; read by
another, the columns' distributions are mixed, and the entropy of a byte, summed over the places in a point,
goes up. Real and simulated clouds lose 0.09 bits a byte and more by any false width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float64 = NDArray[np.float64]

WIDTHS: Final = range(3, 9)
SIZES: Final = tuple(sorted({width * num_bytes for width in WIDTHS for num_bytes in (4, 8)}))
"""Bytes of a point of 3 to 8 columns of float32 or float64."""

MIN_BYTES: Final = 32768
"""Fewer say too little: 500 points of the largest size."""

_SAMPLE_BYTES: Final = 2**18
_CLEARLY: Final = 0.05
"""Bits a byte: about half of what the least false width of a real cloud costs."""

_CLEARLY_BY_PHASE: Final = 0.25
"""Bits a byte of x and y, where every second (third, ...) point is told apart: beams that fire in turn differ
in height and ring, not in the low bits of x and y."""


def better_size(content: Bytes, size: int, position: Sequence[int]) -> int | None:
    """The size of a point that a raw file clearly has, if it is another one.

    Args:
        content: The file.
        size: Of a point, as it is said.
        position: Where the bytes of x and y of a point lie.

    Returns:
        One of `SIZES`; None where nothing speaks against the given one, or the file is too small to say.
    """
    if len(content) < MIN_BYTES:
        return None
    sample = _sample(content, size)
    entropies = {one: _entropy(sample, one) for one in {*SIZES, size}}

    def beats(other: int, one: int, places: Sequence[int]) -> bool:
        if other % one:
            return float(entropies[one].mean() - entropies[other].mean()) > _CLEARLY
        phases = entropies[other].reshape(-1, one)[:, places].mean(axis=0)
        return other > one and float((entropies[one][places] - phases).mean()) > _CLEARLY_BY_PHASE

    first = list(range(8))
    unbeaten = (one for one in SIZES if not any(beats(other, one, first) for other in SIZES))
    best = next(unbeaten, None)
    return best if best is not None and beats(best, size, position) else None


def _sample(content: Bytes, size: int) -> Bytes:
    """Some of a file, evenly spread, in blocks of whole points of every size."""
    block = math.lcm(*SIZES, size)
    num_blocks = len(content) // block
    if not num_blocks or block > _SAMPLE_BYTES:
        return content[:_SAMPLE_BYTES]
    chosen = np.linspace(0, num_blocks - 1, min(num_blocks, _SAMPLE_BYTES // block)).astype(np.int64)
    return content[: num_blocks * block].reshape(num_blocks, block)[chosen].ravel()


def _entropy(content: Bytes, size: int) -> Float64:
    """Bits (size,) that each byte of a point holds; the bias of few points is taken off (Miller, Madow)."""
    num_points = len(content) // size
    table = content[: num_points * size].reshape(num_points, size)
    cells = table + 256 * np.arange(size, dtype=np.int32)
    counts = np.bincount(cells.ravel(), minlength=256 * size).reshape(size, 256)
    shares = counts / num_points
    bits = -(shares * np.log2(np.where(counts, shares, 1.0))).sum(axis=1)
    entropy: Float64 = bits + (np.count_nonzero(counts, axis=1) - 1) / (2 * num_points * math.log(2))
    return entropy
