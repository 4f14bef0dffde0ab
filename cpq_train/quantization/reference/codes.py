"""From float32 numbers to integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError

Float32: TypeAlias = NDArray[np.float32]

ZERO_AMAX = np.float32(2.0**-24)
"""A tensor whose amax is at most this has the codes 0."""


@dataclass(frozen=True)
class Range:
    """Which codes a tensor may have, and which number the largest one stands for.

    Args:
        bits: 2 to 16.
        signed: Two's complement, or codes from 0.
        narrow_range: Without the most negative code.
        amax: Broadcastable to the tensor; None takes the largest magnitude of each tensor (dynamic).
        axis: Of a dynamic amax per channel; None is one for the tensor.
        step_of_zero: Value of code 1 where amax is at most 2^-24.
    """

    bits: int
    signed: bool = True
    narrow_range: bool = False
    amax: Float32 | None = None
    axis: int | None = None
    step_of_zero: float = 1.0

    @property
    def largest(self) -> int:
        """The code of amax."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def smallest(self) -> int:
        """The most negative code."""
        return (0 if not self.signed else -self.largest) - int(self.signed and not self.narrow_range)

    def amax_of(self, x: Float32) -> Float32:
        """amax, looked for in the tensor where it is dynamic."""
        if self.amax is not None:
            return np.asarray(self.amax, np.float32)
        axes = tuple(d for d in range(x.ndim) if d != self.axis)
        largest: Float32 = np.abs(x).max(axes, keepdims=self.axis is not None, initial=0)
        return np.asarray(largest)


class Coded(NamedTuple):
    """A tensor as whole numbers.

    Attributes:
        codes: int32, the shape of the tensor.
        step: float32 value of code 1, the shape of amax.
    """

    codes: NDArray[np.int32]
    step: Float32


def encode(x: Float32, of: Range) -> Coded:
    """Round a tensor to codes.

    Raises:
        UserError: A value is NaN, or infinite where amax is 0: neither has a code.
    """
    amax, largest = of.amax_of(x), np.float32(of.largest)
    is_zero = amax <= ZERO_AMAX
    safe = np.where(is_zero, np.float32(1), amax)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = x * np.where(is_zero, np.float32(0), largest / safe)
    if np.isnan(scaled).any():
        raise UserError(f"{np.isnan(scaled).sum()} of {x.size} numbers are NaN, which has no integer code")
    codes = np.clip(np.rint(scaled), of.smallest, of.largest).astype(np.int32)
    return Coded(codes, np.where(is_zero, np.float32(of.step_of_zero), safe / largest))


def encode_bias(bias: Float32, unit: Float32) -> NDArray[np.int64]:
    """Round a bias to whole multiples of a unit that fp32 holds, at most 2^30 in magnitude.

    Args:
        bias: (C,).
        unit: (C,) or (1,), value of one unit of a sum.
    """
    multiples = np.rint(bias.astype(np.float64) / unit.astype(np.float64))
    codes: NDArray[np.int64] = np.clip(multiples, -(2.0**30), 2.0**30).astype(np.float32).astype(np.int64)
    return codes
