"""Time by layer: marks at the borders of every part, read once the pass is over.

On CUDA a mark is an event, so that nothing waits inside the pass; on the CPU it is the time of a clock. A
part's time is its own: without the parts inside it. What the parts with a row leave of the pass, containers
and the code between modules, is its unattributed rest.

Letters: P passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from cpq_train.profiling.instrument import Part

Mark = Any
"""A CUDA event, or seconds."""

Times = dict[Part, float]
"""Milliseconds of each part with a row, in the order of the pass."""


class Clock(NamedTuple):
    """What times a training step.

    Attributes:
        name: Of it, in words.
        now: Seconds, of marks on the CPU.
    """

    name: str
    now: Callable[[], float]


def clock_of(device: torch.device) -> Clock:
    """The clock for a device.

    With one thread it is the CPU time of the process: what else the machine does is not in it, nor is what
    loading processes do.
    """
    if device.type == "cuda":
        return Clock("CUDA events", time.perf_counter)
    if torch.get_num_threads() == 1:
        return Clock("CPU time of the process", time.process_time)
    return Clock("wall time", time.perf_counter)


class Stopwatch:
    """An observer that takes the time of every part; also started and stopped by itself for the whole.

    Args:
        device: Where the pass runs.
        clock: Seconds, what a mark is on the CPU; None is `time.perf_counter`.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.device = device
        self._clock = clock or time.perf_counter
        self._marks: list[Mark] = []
        self._parts: list[Part | None] = []

    def enter(self, part: Part) -> None:
        """See `Observer`."""
        self._parts.append(part)
        self._mark()

    def leave(self, part: Part, output: Any) -> None:
        """See `Observer`."""
        self._parts.append(None)
        self._mark()

    def start(self) -> None:
        """The whole begins; what was measured before is dropped."""
        self._marks, self._parts = [], []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._mark()

    def stop(self) -> PassTimes:
        """The whole ends; waits for it."""
        self._mark()
        seconds = self._seconds()
        own: Times = {}
        stack: list[Part] = []
        for (begin, end), event in zip(pairwise(seconds), [*self._parts, None], strict=True):
            if stack and stack[-1].is_layer:
                own[stack[-1]] = own.get(stack[-1], 0.0) + 1e3 * (end - begin)
            if event is not None:
                stack.append(event)
            elif stack:
                stack.pop()
        return PassTimes(own, 1e3 * (seconds[-1] - seconds[0]))

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._clock())

    def _seconds(self) -> list[float]:
        if self.device.type != "cuda":
            return self._marks
        torch.cuda.synchronize(self.device)
        return [1e-3 * self._marks[0].elapsed_time(mark) for mark in self._marks]


@dataclass(frozen=True)
class PassTimes:
    """One pass.

    Attributes:
        own: Milliseconds of each part with a row.
        whole_ms: Of the pass.
    """

    own: Times
    whole_ms: float


@dataclass(frozen=True)
class Spread:
    """A time over several passes, milliseconds.

    Attributes:
        ms: Median.
        min_ms: Smallest.
        max_ms: Largest.
    """

    ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: list[float]) -> Spread:
        """Of the times of the passes."""
        return cls(median(times_ms), min(times_ms), max(times_ms))


@dataclass(frozen=True)
class LatencyRow:
    """Time of a layer or function, or of all of one kind.

    Attributes:
        name: Of the part; of the kind.
        kind: Its kind.
        calls: How many parts it sums over.
        time: Over the passes.
        share: Of the whole.
        macs: Multiply-accumulates of a pass.
    """

    name: str
    kind: str
    calls: int
    time: Spread
    share: float
    macs: float

    @property
    def gflop_per_s(self) -> float:
        """Achieved 1e9 operations per second, a multiply-accumulate being two."""
        return 2e-6 * self.macs / self.time.ms if self.time.ms > 0 else 0.0


@dataclass(frozen=True)
class Latency:
    """Time of a pass by layer.

    Attributes:
        whole: The pass while it was measured.
        plain: The pass without hooks: the latency that a user has.
        layers: By falling time.
        kinds: Summed by kind, by falling time.
        unattributed: What is in none of them.
    """

    whole: Spread
    plain: Spread
    layers: list[LatencyRow]
    kinds: list[LatencyRow]
    unattributed: Spread

    @property
    def unattributed_share(self) -> float:
        """Of the whole."""
        return self.unattributed.ms / self.whole.ms


def measure_latency(
    run: Callable[[], Any],
    observe: Callable[[Stopwatch], AbstractContextManager[None]],
    device: torch.device,
    macs: Mapping[str, float],
    num_passes: int,
    num_warm_up: int,
) -> Latency:
    """Time some passes by layer and as many plain ones, in turn.

    Args:
        run: A pass.
        observe: Attaches the stopwatch, see `instrument.observing`.
        device: Where it runs.
        macs: Name -> multiply-accumulates of a pass.
        num_passes: That count.
        num_warm_up: Before them, which do not.
    """
    for _ in range(num_warm_up):
        run()
    watch = Stopwatch(device)
    measured, plain_ms = [], []
    for _ in range(num_passes):
        watch.start()
        run()
        plain_ms.append(watch.stop().whole_ms)
        with observe(watch):
            watch.start()
            run()
            measured.append(watch.stop())
    return summarise(measured, plain_ms, macs)


def summarise(passes: list[PassTimes], plain_ms: list[float], macs: Mapping[str, float]) -> Latency:
    """Medians and spreads over passes; a part that a pass lacks took no time there."""
    whole = Spread.of([p.whole_ms for p in passes])
    parts = list(dict.fromkeys(part for p in passes for part in p.own))
    kinds: dict[str, list[Part]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)

    def row(name: str, kind: str, members: list[Part]) -> LatencyRow:
        time = Spread.of([sum(p.own.get(part, 0.0) for part in members) for p in passes])
        total = sum(macs.get(part.name, 0.0) for part in members)
        return LatencyRow(name, kind, len(members), time, time.ms / whole.ms, total)

    def by_time(rows: list[LatencyRow]) -> list[LatencyRow]:
        return sorted(rows, key=lambda r: -r.time.ms)

    return Latency(
        whole,
        Spread.of(plain_ms),
        by_time([row(part.name, part.kind, [part]) for part in parts]),
        by_time([row(kind, kind, members) for kind, members in kinds.items()]),
        Spread.of([p.whole_ms - sum(p.own.values()) for p in passes]),
    )
