"""Collectors: they see the activations and say their amax.

Histograms are integer counts on a grid whose bin width is a power of two. When a larger value comes,
neighbouring bins are merged until it fits; so the result depends on the values alone, not on their order or
on how they were split into batches.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.quantization.scheme import QuantizerScheme

NUM_BINS = 4096
NUM_MSE_CANDIDATES = 256


class Collector(Protocol):
    """Gathers what it needs of a stream of tensors to say their amax."""

    def collect(self, values: Tensor) -> None:
        """Take in one tensor of any shape."""

    def compute_amax(self) -> float:
        """The amax of all that was seen; NaN where nothing was."""


def new_collector(scheme: QuantizerScheme) -> Collector:
    """The collector for `scheme.method`."""
    return MaxCollector() if scheme.method == "max" else HistogramCollector(scheme)


class MaxCollector:
    """The largest magnitude."""

    def __init__(self) -> None:
        self._amax: Tensor | None = None

    def collect(self, values: Tensor) -> None:
        """Take in one tensor; stays on its device."""
        if values.numel():
            amax = values.abs().max()
            self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)

    def compute_amax(self) -> float:
        """The largest magnitude seen; NaN where nothing was."""
        return float("nan") if self._amax is None else float(self._amax)


class HistogramCollector:
    """A histogram of magnitudes, and amax from it by percentile, mean squared error or entropy.

    Args:
        scheme: `method`, `percentile`, `count_zeros` and the format whose rounding the methods weigh.
    """

    def __init__(self, scheme: QuantizerScheme) -> None:
        self._scheme = scheme
        self._counts = np.zeros(NUM_BINS, np.int64)
        self._width = 0.0
        self._largest = float("nan")

    def collect(self, values: Tensor) -> None:
        """Take in one tensor."""
        if not self._scheme.count_zeros:
            values = values[values != 0]
        if not values.numel():
            return
        magnitude = values.abs().float().flatten()
        largest = float(magnitude.max())
        if not np.isfinite(largest):
            self._largest = largest
            return
        self._largest = max(largest, self._largest) if self._largest == self._largest else largest
        self._fit(largest)
        # width is a power of two: the division is exact, and so is the choice of the bin.
        bins = (magnitude / self._width).long().clamp_(max=NUM_BINS - 1)
        self._counts += torch.bincount(bins, minlength=NUM_BINS).cpu().numpy()

    def _fit(self, largest: float) -> None:
        if self._width == 0.0:
            self._width = 2.0 ** (np.frexp(max(largest, 2.0**-100))[1] - np.log2(NUM_BINS))
        while largest > self._width * NUM_BINS:
            merged = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.concatenate([merged, np.zeros(NUM_BINS // 2, np.int64)])
            self._width *= 2

    def compute_amax(self) -> float:
        """The amax that the scheme's method picks; NaN where nothing was seen."""
        if not np.isfinite(self._largest) or not self._counts.any():
            return self._largest if self._largest != 0 else 0.0
        method = {"percentile": self._percentile, "mse": self._mse, "entropy": self._entropy}
        return float(min(method[self._scheme.method](), self._largest))

    def _percentile(self) -> float:
        share = np.cumsum(self._counts) / self._counts.sum()
        return float(np.searchsorted(share, self._scheme.percentile / 100) + 1) * self._width

    def _mse(self) -> float:
        """The candidate with the least squared rounding and clipping error over the bin centres."""
        centres = (np.arange(NUM_BINS) + 0.5) * self._width
        used = np.flatnonzero(self._counts)
        centres, counts = centres[used], self._counts[used].astype(np.float64)
        candidates = self._largest * np.arange(1, NUM_MSE_CANDIDATES + 1) / NUM_MSE_CANDIDATES
        qmax = self._scheme.number_format.qmax
        errors = [
            float(counts @ (np.minimum(np.rint(centres * (qmax / a)), qmax) * (a / qmax) - centres) ** 2)
            for a in candidates
        ]
        return float(candidates[int(np.argmin(errors))])

    def _entropy(self) -> float:
        """The range whose quantized distribution has the least Kullback-Leibler divergence, as TensorRT does.

        Every candidate range keeps its clipped counts in its last bin; the distribution quantized to qmax + 1
        levels spreads each level's count evenly over the bins that were not empty.
        """
        levels = self._scheme.number_format.qmax + 1
        num_used = int(np.flatnonzero(self._counts)[-1]) + 1
        ends = range(min(levels, num_used), num_used + 1, max(1, NUM_BINS // 512))
        divergences = [_divergence(self._counts, end, levels) for end in ends]
        return ends[int(np.argmin(divergences))] * self._width


def _divergence(counts: NDArray[np.int64], end: int, levels: int) -> float:
    kept = counts[:end].astype(np.float64)
    level = np.arange(end) * levels // end
    filled = kept > 0
    per_level = np.bincount(level, kept, levels)
    num_filled = np.bincount(level, filled, levels)
    spread = np.where(filled, per_level[level] / np.maximum(num_filled[level], 1), 0.0)
    kept[-1] += counts[end:].sum()
    if spread[-1] == 0 and kept[-1] > 0:
        return float("inf")
    p, q = kept / kept.sum(), spread / spread.sum()
    mask = p > 0
    return float(np.sum(p[mask] * np.log(p[mask] / q[mask])))
