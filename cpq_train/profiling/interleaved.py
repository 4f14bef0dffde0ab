"""Times of several runs that can be compared: measured in turn, in one process, on one machine.

What the machine does beside, and how warm it is, changes over minutes. Runs that take turns share it; runs
measured one after the other do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from cpq_train.profiling.latency import Spread, Stopwatch


@dataclass(frozen=True)
class Timing:
    """Time of a run over the rounds.

    Attributes:
        wall: On the clock.
        cpu_ms: Median of what all threads of the process computed, milliseconds.
    """

    wall: Spread
    cpu_ms: float


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, num_rounds: int, num_warm_up: int
) -> dict[str, Timing]:
    """Time runs in rounds, each once per round; the order turns around so that none always follows the same.

    Args:
        runs: Name -> what to time.
        device: Where they run.
        num_rounds: How often each is timed.
        num_warm_up: Calls of each before that, which are not.
    """
    for run in runs.values():
        for _ in range(num_warm_up):
            run()
    watch = Stopwatch(device)
    wall_ms: dict[str, list[float]] = {name: [] for name in runs}
    cpu_ms: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(num_rounds):
        for name in names:
            watch.start()
            began = time.process_time()
            runs[name]()
            wall_ms[name].append(watch.stop().whole_ms)
            cpu_ms[name].append(1e3 * (time.process_time() - began))
        names.reverse()
    return {name: Timing(Spread.of(wall_ms[name]), median(cpu_ms[name])) for name in runs}
