"""What the sums of a loss are divided by: numbers of all samples of a step, on whatever rank they are.

DDP averages gradients over the ranks. If each rank divided by its own number of objects, an object would
weigh less on a rank that has many. Divided by the mean number per rank, the average over the ranks is the
loss of the whole batch in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cpq_train.models.constants import constant

SumOverRanks: TypeAlias = Callable[[Tensor], Tensor]
"""Elementwise sum of a tensor over the ranks, the same on all of them; not differentiated."""


def one_rank(values: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return values


class Sum(NamedTuple):
    """A part of a loss before it is divided.

    Attributes:
        total: Sum over this rank's samples, a scalar or of any shape; differentiable.
        divisor: What it is divided by, summed over this rank's samples; the shape of `total`.
        least: A smaller divisor, over all ranks, counts as this.
    """

    total: Tensor
    divisor: Tensor
    least: float = 1.0


def divided(sums: Sequence[Sum], sum_over_ranks: SumOverRanks) -> list[Tensor]:
    """Divide every part by its mean divisor per rank; exchanges one tensor for all parts.

    Args:
        sums: Parts, equally many of equal shapes on all ranks.
        sum_over_ranks: Adds up the divisors.

    Returns:
        Parts, of the shapes of their totals. Their means over the ranks are those of one process.
    """
    mine = [part.divisor.detach().flatten() for part in sums]
    # The last number counts the ranks.
    summed = sum_over_ranks(torch.cat([*mine, constant((1.0,), mine[0].device)]))
    of_parts = summed[:-1].split([len(divisor) for divisor in mine])
    return [
        part.total * summed[-1] / divisor.clamp(min=part.least).view_as(part.total)
        for part, divisor in zip(sums, of_parts, strict=True)
    ]
