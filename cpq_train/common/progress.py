"""How far a loop has come: a bar on a terminal, and in a log a line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from cpq_train.common.console import new_console
from cpq_train.common.text import visible

T = TypeVar("T")

EVERY_N_SECONDS = 30.0
"""Least time between two lines; a loop that ends sooner prints none."""


def draws_bars() -> bool:
    """Whether stdout is a terminal that can draw a bar; elsewhere lines are printed."""
    # rich takes FORCE_COLOR for a terminal, which a job inherits from the shell that submitted it.
    return sys.stdout.isatty() and not new_console().is_dumb_terminal


def say(text: str) -> None:
    """Print a line of progress, with date and time.

    On stderr, as what is said of a run's end: stdout has the results of a verb.
    """
    print(time.strftime("%Y-%m-%d %H:%M:%S"), visible(text), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def rate(per_s: float) -> str:
    """A number per second, to three digits."""
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.3g}"


def track(items: Iterable[T], description: str | None, total: int | None = None) -> Iterator[T]:
    """The items, and how far their loop has come.

    Args:
        items: Of the loop.
        description: What it does; None says nothing, as on all ranks but one.
        total: Number of items, where `items` does not know it.
    """
    if description is None:
        yield from items
        return
    if total is None:
        total = length_hint(items) or None
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress(description: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """For work that is no loop over items: gives a function that takes what was done since its last call.

    Args:
        description: What is done, and in what unit unless it is obvious.
        total: All that is to be done; None where nobody knows.
    """
    if not draws_bars():
        lines = Lines(description, total)
        yield lines.advance
        lines.end()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.description}", markup=False)
    columns = (said, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Which also leaves the terminal as it was where the loop ends early.
    with Progress(*columns, console=new_console()) as bar:
        task = bar.add_task(visible(description), total=total)
        yield lambda count: bar.advance(task, count)


class Lines:
    """The lines of a loop, which begins now.

    Args:
        description: What it does.
        total: All that is to be done; None where nobody knows.
        every_n_seconds: Least time from the begin to the first line, and between two.
    """

    def __init__(
        self, description: str, total: float | None, every_n_seconds: float = EVERY_N_SECONDS
    ) -> None:
        self._description, self._total, self._every_n_seconds = description, total, every_n_seconds
        self._done = 0.0
        self._begun_s = self._said_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begun_s

    def advance(self, count: float) -> None:
        """So much more is done."""
        self._done += count
        now_s = time.monotonic()
        if now_s - self._said_s >= self._every_n_seconds:
            self._said_s = now_s
            if self._done != self._total:  # which `end` says
                say(f"{self._description}: {self._status(now_s - self._begun_s)}")

    def end(self) -> None:
        """All is done: the last line, where it took long enough for any."""
        if self._said_s > self._begun_s:
            say(f"{self._description}: {self._done:.0f} in {duration(self.elapsed_s)}")

    def _status(self, elapsed_s: float) -> str:
        per_s = self._done / elapsed_s
        if not self._total:
            return f"{self._done:.0f}, {rate(per_s)} per s"
        return (
            f"{self._done:.0f} of {self._total:.0f}, {100 * self._done / self._total:.0f} %, "
            f"{rate(per_s)} per s, {duration((self._total - self._done) / per_s)} left"
        )
