"""Collectors: they see the activations and say their amax.

Histograms are integer counts on a grid whose bin width is a power of two and follows from the largest value
alone. When a larger value comes, neighbouring bins are merged until it fits; so the result depends on the
values alone, not on their order, on how they were split into batches, or on which rank saw which batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.quantization.calibrators.counts import counts_of, limits_of
from cpq_train.quantization.ranks import largest_over_ranks, sum_over_ranks
from cpq_train.quantization.scheme import QuantizerScheme

NUM_BINS = 4096
NUM_MSE_CANDIDATES = 256
LEAST_EXPONENT = -99
"""Histograms never end below 2^-99, where bins would leave the range of fp32."""


def new_collector(scheme: QuantizerScheme) -> Collector:
    """The collector for `scheme.method`; the foreground search starts from the largest magnitude."""
    return Collector(scheme) if scheme.method in ("max", "foreground") else HistogramCollector(scheme)


class Collector:
    """Gathers what it needs of a stream of tensors to say their amax; this one, the largest magnitude.

    Args:
        scheme: Of the quantizer; whether it is signed, and what its method needs.
    """

    def __init__(self, scheme: QuantizerScheme) -> None:
        self._scheme = scheme
        self._limits: Tensor | None = None  # -minimum and maximum, NaN once a NaN was seen
        self._num_values = 0
        self._num_negative: Tensor | int = 0

    def collect(self, values: Tensor) -> None:
        """Take in one tensor of any shape; what is kept stays on its device."""
        if not values.numel():
            return
        self._take_in(values, limits_of(values))

    def _take_in(self, values: Tensor, limits: Tensor) -> None:
        self._limits = limits if self._limits is None else torch.maximum(self._limits, limits)
        self._num_values += values.numel()
        # On the CPU it is known whether there are any; to ask another device would be to wait for it.
        may_be_negative = limits.device.type != "cpu" or bool(limits[0] > 0)
        if not self._scheme.signed and may_be_negative:
            self._num_negative = self._num_negative + (values < 0).sum()

    def reduce(self, device: torch.device) -> None:
        """Take in what the other ranks saw; every rank must call this, also one that saw nothing.

        Args:
            device: Where the process group exchanges tensors.
        """
        unseen = torch.full((2,), -torch.inf, device=device)
        self._limits = largest_over_ranks(unseen if self._limits is None else self._limits)
        counts = torch.tensor([self._num_values, int(self._num_negative)], device=device)
        self._num_values, self._num_negative = sum_over_ranks(counts).tolist()

    @property
    def largest(self) -> float:
        """The largest magnitude seen, NaN where nothing or a NaN was."""
        return float("nan") if self._limits is None or not self._num_values else float(self._limits.max())

    def compute_amax(self) -> float:
        """The amax of all that was seen; NaN where nothing was, NaN or infinite where such a value was."""
        return self.largest

    def problem(self) -> tuple[str, str] | None:
        """What makes the range unfit and in how many of the values seen, None where it is fit."""
        some = f"some of {self._num_values}"
        if not self._num_values:
            return "nothing: it saw no tensor", "0 of 0"
        if math.isnan(self.largest):
            return "NaN in the tensors it saw", some
        if math.isinf(self.largest):
            return "infinite values in the tensors it saw", some
        if self.largest == 0:
            return "zero: all values it saw are zero", f"{self._num_values} of {self._num_values}"
        if self._num_negative:
            return self._clipped(), f"{int(self._num_negative)} of {self._num_values}"
        return None

    def _clipped(self) -> str:
        assert self._limits is not None
        lowest = -float(self._limits[0])
        return f"negative values down to {lowest:.4g}; an unsigned quantizer clips them: use signed: true"


class HistogramCollector(Collector):
    """A histogram of magnitudes, and amax from it by percentile, mean squared error or entropy.

    Zeros are left out of it: whatever the range, they have a code of their own. Only a percentile may count
    them, where `scheme.count_zeros` says so.

    Args:
        scheme: `method`, `percentile`, `count_zeros` and the format whose rounding the methods weigh.
    """

    def __init__(self, scheme: QuantizerScheme) -> None:
        super().__init__(scheme)
        self._counts = np.zeros(NUM_BINS, np.int64)
        self._exponent = LEAST_EXPONENT

    @property
    def _width(self) -> float:
        return 2.0**self._exponent / NUM_BINS

    def _take_in(self, values: Tensor, limits: Tensor) -> None:
        super()._take_in(values, limits)
        largest = float(limits.max())
        if largest == 0 or not math.isfinite(largest):
            return  # the limits say so
        self._grow(_exponent_above(largest))
        self._counts += counts_of(values, self._width, NUM_BINS)

    def _grow(self, exponent: int) -> None:
        """Merge bins until they reach to 2^exponent."""
        if exponent <= self._exponent:
            return
        merged = self._counts.reshape(-1, min(2 ** (exponent - self._exponent), NUM_BINS)).sum(1)
        self._counts = np.pad(merged, (0, NUM_BINS - len(merged)))
        self._exponent = exponent

    def reduce(self, device: torch.device) -> None:
        """Take in what the other ranks saw: the widest grid, and the sums of the counts on it."""
        super().reduce(device)
        exponent = torch.tensor([float(self._exponent)], device=device)
        self._grow(int(largest_over_ranks(exponent)))
        self._counts = sum_over_ranks(torch.from_numpy(self._counts).to(device)).cpu().numpy()

    def problem(self) -> tuple[str, str] | None:
        """What makes the range unfit and in how many of the values seen, None where it is fit."""
        found = super().problem()
        if found is None and self._scheme.method == "percentile" and not self._percentile():
            share = f"zero, as {self._scheme.percentile:g} % of the values it saw are"
            return f"{share}: use count_zeros: false", f"{self._num_zeros} of {self._num_values}"
        return found

    @property
    def _num_zeros(self) -> int:
        return self._num_values - int(self._counts.sum())

    def compute_amax(self) -> float:
        """The amax that the scheme's method picks; NaN where nothing was seen, 0 where a percentile is."""
        if not math.isfinite(self.largest) or not self._counts.any():
            return self.largest
        method = {"percentile": self._percentile, "mse": self._mse, "entropy": self._entropy}
        return float(min(method[self._scheme.method](), self.largest))

    def _percentile(self) -> float:
        num_zeros = self._num_zeros if self._scheme.count_zeros else 0
        below = num_zeros + np.concatenate([[0], np.cumsum(self._counts)])
        return float(np.searchsorted(below / below[-1], self._scheme.percentile / 100)) * self._width

    def _mse(self) -> float:
        """The candidate with the least squared rounding and clipping error over the bin centres."""
        centres = (np.arange(NUM_BINS) + 0.5) * self._width
        used = np.flatnonzero(self._counts)
        centres, counts = centres[used], self._counts[used].astype(np.float64)
        candidates = self.largest * np.arange(1, NUM_MSE_CANDIDATES + 1) / NUM_MSE_CANDIDATES
        fmt = self._scheme.number_format

        def error(amax: float) -> float:
            rounded = fmt.round_(torch.from_numpy(centres * (fmt.qmax / amax))).numpy()
            return float(counts @ (rounded * (amax / fmt.qmax) - centres) ** 2)

        return float(candidates[int(np.argmin([error(amax) for amax in candidates]))])

    def _entropy(self) -> float:
        """The range whose quantized distribution has the least divergence from what was seen.

        After TensorRT: every candidate range keeps the counts beyond it in its last bin. That has to be a
        filled one, and the whole range is among the candidates.
        """
        fmt = self._scheme.number_format
        levels = 2 ** (fmt.bits - int(fmt.signed))
        filled = np.flatnonzero(self._counts)
        num_used = int(filled[-1]) + 1
        ends = np.arange(min(levels, num_used), num_used + 1, NUM_BINS // 512)
        ends = np.union1d(filled[np.searchsorted(filled, ends - 1)], filled[-1]) + 1
        divergences = [_divergence(self._counts, int(end), levels) for end in ends]
        return float(ends[int(np.argmin(divergences))]) * self._width


def _exponent_above(magnitude: float) -> int:
    """The least e, not below `LEAST_EXPONENT`, with magnitude < 2^e."""
    return max(math.frexp(magnitude)[1], LEAST_EXPONENT) if magnitude else LEAST_EXPONENT


def _divergence(counts: NDArray[np.int64], end: int, levels: int) -> float:
    """Kullback-Leibler divergence of the counts and those quantized to levels up to a filled bin.

    A level's count is spread evenly over those of its bins that are not empty. Unlike in TensorRT, what is
    clipped is missing from the quantized distribution, so that to clip a share s costs at least -log(1 - s):
    else the best range may be one so narrow that most values are clipped into its last bin.
    """
    kept = counts[:end].astype(np.float64)
    level = np.arange(end) * levels // end
    filled = kept > 0
    per_level = np.bincount(level, kept, levels)
    num_filled = np.bincount(level, filled, levels)
    spread = per_level[level[filled]] / num_filled[level[filled]]
    kept[-1] += counts[end:].sum()
    share = kept[filled] / kept.sum()
    return float(np.sum(share * np.log(kept[filled] / spread)))
