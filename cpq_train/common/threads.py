"""Work shared out over as many threads as PyTorch has."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

_POOLS: list[ThreadPoolExecutor] = []


def share_out(work: Callable[[int, int], None], length: int) -> None:
    """Calls `work(first, last)` for ranges that cover `length`, each in a thread of its own.

    Args:
        work: Holds no lock of Python's while it computes; ranges do not depend on one another.
        length: What is shared out.
    """
    num_parts = min(torch.get_num_threads(), length)
    if num_parts <= 1:
        work(0, length)
        return
    bounds = [length * part // num_parts for part in range(num_parts + 1)]
    for done in [_pool().submit(work, *ends) for ends in pairwise(bounds)]:
        done.result()


def _pool() -> ThreadPoolExecutor:
    if not _POOLS:
        _POOLS.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cpq_train"))
    return _POOLS[0]


os.register_at_fork(after_in_child=_POOLS.clear)  # a fork has none of its parent's threads
