"""The numbers a quantizer may use: integers of 2 to 16 bits, and FP8 E4M3.

A format rounds a tensor that was scaled so that amax lies on its largest number, `qmax`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

EXACT_LIMIT = 2.0**24
"""fp32 holds every whole number up to here."""


@dataclass(frozen=True)
class IntegerFormat:
    """The integers a quantizer may use.

    Args:
        bits: Width of a code, 2 to 16.
        signed: Two's complement, or non-negative codes only.
        narrow_range: Leave out the most negative code, so that the range is symmetric.
    """

    bits: int = 8
    signed: bool = True
    narrow_range: bool = False

    @property
    def qmax(self) -> int:
        """Largest code, the one that amax is mapped to."""
        return int(2 ** (self.bits - int(self.signed)) - 1)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if not self.signed:
            return 0
        return -self.qmax if self.narrow_range else -self.qmax - 1

    @property
    def largest_magnitude(self) -> int:
        """max(|qmin|, qmax)."""
        return max(-self.qmin, self.qmax)

    def round_(self, scaled: Tensor) -> Tensor:
        """Whole numbers in [qmin, qmax], ties to even, in place."""
        return scaled.round_().clamp_(self.qmin, self.qmax)


@dataclass(frozen=True)
class Float8Format:
    """FP8 E4M3 without infinities (OCP FP8 specification, "E4M3"): 448 is the largest number.

    The mantissa has three bits: steps are relative, so that no integer sum stands behind a layer and its
    arithmetic is simulated.
    """

    bits: ClassVar[int] = 8
    signed: ClassVar[bool] = True
    qmax: ClassVar[int] = 448
    qmin: ClassVar[int] = -448

    def round_(self, scaled: Tensor) -> Tensor:
        """The nearest FP8 numbers, ties to even; beyond 448 they saturate, as a deployed cast does."""
        # A NaN stays one: clamp passes it on, and E4M3 has one.
        return scaled.copy_(scaled.clamp_(self.qmin, self.qmax).to(torch.float8_e4m3fn))


NumberFormat: TypeAlias = IntegerFormat | Float8Format


def log_range_divisor(num_numbers: int, num_ranges: int, fmt: NumberFormat) -> float:
    """What LSQ divides the gradient of a range by: sqrt(N * qmax), N being the numbers that share it."""
    return math.sqrt(max(num_numbers // num_ranges, 1) * fmt.qmax)
