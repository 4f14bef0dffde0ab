"""The same numbers on every rank; without a process group there is one rank, and nothing happens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.quantization.health import Problem, table


def largest_over_ranks(values: Tensor) -> Tensor:
    """Elementwise maximum over the ranks, NaN where any rank has NaN.

    Args:
        values: Floating point, of one shape on all ranks.
    """
    if not _has_ranks():
        return values
    # Backends differ in what their maximum does with NaN.
    known = torch.where(values.isnan(), -torch.inf, values)
    both = torch.stack([known, values.isnan().to(values.dtype)])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return torch.where(both[1] > 0, torch.nan, both[0])


def sum_over_ranks(counts: Tensor) -> Tensor:
    """Elementwise sum over the ranks of tensors of one shape."""
    if _has_ranks():
        counts = counts.clone()
        dist.all_reduce(counts, dist.ReduceOp.SUM)
    return counts


def check_equal_over_ranks(ranges: Mapping[str, Tensor]) -> None:
    """Compare amax bit for bit over the ranks; every rank must call this.

    Args:
        ranges: Name of a quantizer -> its amax.

    Raises:
        UserError: Ranks differ, with a table of the quantizers that do.
    """
    if not _has_ranks():
        return
    mine = {name: amax.detach().cpu().numpy().tobytes() for name, amax in ranges.items()}
    of_ranks: list[dict[str, bytes]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
    problems = []
    for name in names:
        others = [r for r, of_rank in enumerate(of_ranks) if of_rank.get(name) != of_ranks[0].get(name)]
        if others:
            ranks = ", ".join(map(str, others))
            problems.append(
                Problem(name, "", f"differs from rank 0 on rank {ranks}", f"{len(others)} of {len(of_ranks)}")
            )
    if problems:
        raise UserError(f"{len(problems)} quantizers differ between ranks:\n{table(problems)}")


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
