"""Passes over flat fp32 arrays that calibration makes, each in place of several of PyTorch's."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import numpy as np

from cpq_train.common.compiled import compiled


@compiled
def limits(bits: Any) -> tuple[Any, Any]:
    """The smallest and the largest number, as the int32 that `float_of` reads.

    Args:
        bits: The array as int32. Other than numbers, these are compared several at a time; turned over where
            they are negative they are in the order of the numbers, with NaN at both ends.
    """
    low, high = np.int32(2**31 - 1), np.int32(-(2**31))
    for i in range(len(bits)):
        key = bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(2**31 - 1))
        low, high = min(low, key), max(high, key)
    return low, high


@compiled
def add_counts(x: Any, per_bin: Any, counts: Any) -> None:
    """Count magnitudes by bin.

    Args:
        x: Finite.
        per_bin: Bins per unit.
        counts: int64, first of the zeros, then of each bin: so no number decides where the code branches.
    """
    for i in range(len(x)):
        magnitude = np.abs(x[i])
        counts[np.int32(magnitude * per_bin) + (magnitude > np.float32(0))] += 1
