"""Rounding of many weights at once, which lie one behind the other, a row an output channel.

Letters: N numbers, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cpq_train.common.kernels import are_on
from cpq_train.common.threads import share_out
from cpq_train.quantization.numerics.device.operators import operators
from cpq_train.quantization.numerics.formats import IntegerFormat, log_range_divisor
from cpq_train.quantization.numerics.one_pass import Array


class Place(NamedTuple):
    """Where a weight lies among the joined ones.

    Attributes:
        order: Its axes, that of the rows first, the others as they lie in memory.
        shape: Of the weight.
        strides: Of its numbers among the joined ones.
        start: First of its numbers.
    """

    order: tuple[int, ...]
    shape: torch.Size
    strides: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, weight: Tensor, row_axis: int, start: int = 0) -> Place:
        """That of a weight."""
        strides_of = weight.stride()
        others = sorted((d for d in range(weight.dim()) if d != row_axis), key=lambda d: -strides_of[d])
        order = (row_axis, *others)
        sizes = [weight.shape[d] for d in order]
        behind = list(accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1]
        strides = dict(zip(order, behind, strict=True))
        return cls(order, weight.shape, tuple(strides[d] for d in range(weight.dim())), start)

    def joined(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor of that shape in the order of the joined ones."""
        return tensor.permute(self.order).reshape(-1)

    def part_of(self, joined: Tensor) -> Tensor:
        """The other way round."""
        return joined.as_strided(self.shape, self.strides, self.start)


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

    @classmethod
    def of(cls, weight: Tensor, row_axis: int, fmt: IntegerFormat) -> Rows:
        """Those of one weight."""
        num_rows = weight.shape[row_axis]
        length = weight.numel() // num_rows
        starts = torch.arange(0, weight.numel() + 1, length, device=weight.device)
        bounds = (weight.new_full((num_rows,), code) for code in (fmt.qmin, fmt.qmax))
        return cls(starts, length, *bounds)

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


def learn_weight(
    grad: Tensor, weight: Tensor, row_axis: int, fmt: IntegerFormat, ranges: RowRanges
) -> tuple[Tensor, Tensor]:
    """Gradients of a weight and of log(amax), as `learn_rows` has them: the bits that they have among others.

    Args:
        grad: Of its values.
        weight: The weight.
        row_axis: Axis of the rows.
        fmt: The integers in use.
        ranges: By row, or one of all; any shape.

    Returns:
        Gradient of the weight; that of log(amax), in the shape of the ranges.
    """
    place, rows = Place.of(weight, row_axis), Rows.of(weight, row_axis, fmt)
    by_row = RowRanges(*(tensor.reshape(-1).expand(len(rows.smallest)).contiguous() for tensor in ranges))
    factor = torch.ones_like(rows.smallest)
    passed, sums = learn_rows(place.joined(grad), place.joined(weight), rows, factor, by_row)
    divisor = torch.full_like(sums, log_range_divisor(weight.numel(), ranges.amax.numel(), fmt))
    return place.part_of(passed), sums_by_range(sums / divisor, ranges.amax)


def sums_by_range(sums: Tensor, amax: Tensor) -> Tensor:
    """Sums by row in the shape of the ranges, one a row or one of all."""
    return (sums if amax.numel() == len(sums) else sums.sum()).view(amax.shape)


def _arrays(*tensors: Tensor) -> tuple[Array, ...]:
    return tuple(np.asarray(tensor.detach().contiguous().numpy()) for tensor in tensors)
