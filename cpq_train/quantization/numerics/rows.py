"""Rounding of many weights at once, which lie one behind the other, a row an output channel.

Letters: N numbers, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cpq_train.common.kernels import are_on
from cpq_train.common.threads import share_out
from cpq_train.quantization.numerics.device.operators import operators
from cpq_train.quantization.numerics.one_pass import Array


@dataclass(frozen=True)
class Rows:
    """Where rows lie, and what their codes may be.

    Attributes:
        starts: First number of each row, and N; (R + 1,) int64.
        longest: Length of the longest row.
        smallest: Code, (R,) fp32.
        largest: Code, (R,) fp32.
    """

    starts: Tensor
    longest: int
    smallest: Tensor
    largest: Tensor

    @property
    def _are_for_loops(self) -> bool:
        return self.starts.device.type == "cpu" and are_on()


class RowRanges(NamedTuple):
    """By row, (R,) fp32: amax, codes per unit, and the value of code 1."""

    amax: Tensor
    scale: Tensor
    step: Tensor


def round_rows(
    flat: Tensor, rows: Rows, ranges: RowRanges, has_values: bool, has_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `device.eager.round_rows`."""
    if not rows._are_for_loops or has_sums:
        return cast(
            tuple[Tensor, Tensor, Tensor],
            operators.round_rows(
                *(flat, rows.starts, rows.longest, ranges.scale, ranges.step, rows.smallest, rows.largest),
                *(has_values, has_sums),
            ),
        )
    from cpq_train.quantization.numerics import loops  # Numba, whose import takes a second

    codes = torch.empty_like(flat)
    values = torch.empty_like(flat) if has_values else flat.new_empty(0)
    starts, *by_row = _arrays(rows.starts, ranges.scale, ranges.step, rows.smallest, rows.largest)
    numbers = _arrays(flat, codes, values)

    def work(a: int, b: int) -> None:
        given, *made = numbers
        loops.round_rows(given, starts[a : b + 1], *(array[a:b] for array in by_row), *made)

    share_out(work, len(rows.smallest))
    return codes, values, flat.new_empty(0)


def pass_rows(grad: Tensor, flat: Tensor, rows: Rows, factor: Tensor, amax: Tensor) -> Tensor:
    """See `device.eager.pass_rows`."""
    if not rows._are_for_loops:
        return cast(Tensor, operators.pass_rows(grad, flat, rows.starts, rows.longest, factor, amax))
    from cpq_train.quantization.numerics import loops  # Numba, whose import takes a second

    out = torch.empty_like(grad)
    starts, factors, limits = _arrays(rows.starts, factor, amax)
    grads, numbers, passed = _arrays(grad, flat, out)

    def work(a: int, b: int) -> None:
        loops.pass_rows(grads, numbers, starts[a : b + 1], factors[a:b], limits[a:b], passed)

    share_out(work, len(amax))
    return out


def learn_rows(
    grad: Tensor, flat: Tensor, rows: Rows, factor: Tensor, ranges: RowRanges
) -> tuple[Tensor, Tensor]:
    """See `device.eager.learn_rows`."""
    by_row = factor, *ranges, rows.smallest, rows.largest
    return cast(tuple[Tensor, Tensor], operators.learn_rows(grad, flat, rows.starts, rows.longest, *by_row))


def _arrays(*tensors: Tensor) -> tuple[Array, ...]:
    return tuple(np.asarray(tensor.detach().contiguous().numpy()) for tensor in tensors)
