"""Sums of products of codes, exact.

NumPy multiplies int64 matrices without BLAS, a hundred times slower than fp64 ones. So the codes are held in
fp64, where every product and every partial sum is a whole number below 2^53 and thus exact in whatever order
BLAS adds them; and some sums of each layer are computed again in int64, by another path.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpq_train.quantization.reference.rulebook import Rules

FLOAT64_WHOLE = 2**53
"""fp64 holds every whole number up to here."""

NUM_CHECKED = 48
"""Sums of a layer that are computed again in int64."""


def exact_sums(
    codes: NDArray[np.int32], kernel: NDArray[np.int32], rules: Rules, num_out: int
) -> NDArray[np.int64]:
    """Every sum of a convolution.

    Args:
        codes: Codes of the input, (rows, C).
        kernel: Codes of the weight, (K, C, C').
        rules: For each of the K offsets, rows of the input and of the output.
        num_out: Rows of the output.

    Returns:
        (num_out, C').
    """
    largest = [int(np.abs(c).max(initial=0)) for c in (codes, kernel)]
    assert kernel[..., 0].size * largest[0] * largest[1] < FLOAT64_WHOLE
    rows, taps = codes.astype(np.float64), kernel.astype(np.float64)
    sums = np.zeros((num_out, kernel.shape[2]))
    for tap, (row_in, row_out) in zip(taps, rules, strict=True):
        sums[row_out] += rows[row_in] @ tap
    whole = sums.astype(np.int64)
    _check_some(whole, codes, kernel, rules)
    return whole


def _check_some(
    sums: NDArray[np.int64], codes: NDArray[np.int32], kernel: NDArray[np.int32], rules: Rules
) -> None:
    if not sums.size:
        return
    rng = np.random.default_rng(sums.size)
    row, channel = (rng.integers(0, size, NUM_CHECKED) for size in sums.shape)
    total = np.zeros(NUM_CHECKED, np.int64)
    for tap, (row_in, row_out) in zip(kernel, rules, strict=True):
        source = np.full(len(sums), -1)
        source[row_out] = row_in
        hit = source[row] >= 0
        products = codes[source[row][hit]].astype(np.int64) * tap[:, channel[hit]].T
        total[hit] += products.sum(1)
    assert np.array_equal(total, sums[row, channel]), "fp64 sums are not the int64 ones"
