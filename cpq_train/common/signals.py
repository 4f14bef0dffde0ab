"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGUSR1, which SLURM sends before a job's end.

A process that imports and parses ends at once, a verb ends in order, and a fit that trains ends between two
steps, when it is saved. Imported before everything else, and so without torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum, auto
from types import FrameType
from typing import Any


class Request(IntEnum):
    """What was asked for; where ranks were asked for different things the largest holds."""

    NONE = 0
    INTERRUPT = 1
    """SIGINT, Ctrl-C: save and stop."""
    STOP = 2
    """SIGTERM: save and stop."""
    REQUEUE = 3
    """SIGUSR1: save, stop and put the SLURM job back in line."""


SIGNALS = {
    signal.SIGINT: Request.INTERRUPT,
    signal.SIGTERM: Request.STOP,
    signal.SIGUSR1: Request.REQUEUE,
}


class Stopped(SystemExit):
    """The process ends because it was asked to.

    Args:
        request: What was asked for.
        said: What has become of its work.
        is_watched: Whether this process' exit code says how the run ended.
        is_agreed: Whether all ranks stop together, of which rank 0 speaks for all.
    """

    def __init__(
        self,
        request: Request,
        said: str = "ended before it was done",
        is_watched: bool = True,
        is_agreed: bool = False,
    ) -> None:
        super().__init__(128 + _signal_of(request))
        self.request, self.said = request, said
        self.is_watched, self.is_agreed = is_watched, is_agreed


class _Mode(Enum):
    ENDING = auto()
    """Nothing is begun: a signal ends the process on the spot."""
    RAISING = auto()
    """A signal raises `Stopped`, wherever the process is."""
    NOTING = auto()
    """A signal is noted, and whoever runs the steps asks for it."""
    STOPPING = auto()
    """The process is on its way out, which only a second Ctrl-C cuts short."""


_RANK_0_S = 10.0
"""How long rank 0 has for putting the job back in line, before another rank does."""

# Signals belong to the process, and so does what became of them.
_mode = _Mode.ENDING
_received = Request.NONE
_is_interrupted = False


def take_signals() -> None:
    """From now on a signal ends this process on the spot, but not without a word, nor without its job."""
    for number in _heeded():
        signal.signal(number, _handle)


def leave_signals() -> None:
    """From now on the system's signals change nothing: the work is done, and its exit code is settled."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def raising_signals() -> Iterator[None]:
    """Have signals raise `Stopped` inside; the earlier handlers come back afterwards."""
    global _mode, _received, _is_interrupted
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread only
        return
    earlier_mode, _mode, _received, _is_interrupted = _mode, _Mode.RAISING, Request.NONE, False
    earlier = {number: signal.signal(number, _handle) for number in _heeded()}
    earlier[signal.SIGALRM] = signal.signal(signal.SIGALRM, _raise_again)
    earlier_hook, sys.unraisablehook = sys.unraisablehook, _Again(sys.unraisablehook)
    try:
        yield
        if any(signal.getitimer(signal.ITIMER_REAL)):
            raise Stopped(_received)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = earlier_hook
        for number, handler in earlier.items():
            signal.signal(number, handler)
        _mode = earlier_mode


def _heeded() -> list[signal.Signals]:
    """Signals that this process was not started to ignore, as a shell starts its background with Ctrl-C."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def note_signals() -> None:
    """Until the end of the innermost `raising_signals`, note signals instead of raising."""
    global _mode
    if _mode is _Mode.RAISING:
        _mode = _Mode.NOTING


def raise_signals() -> None:
    """From here on raise again: nobody asks any more for what is noted."""
    global _mode
    if _mode is _Mode.NOTING:
        _mode = _Mode.RAISING


def received() -> Request:
    """What this process was asked for since `raising_signals` began."""
    return _received


def _handle(number: int, _: FrameType | None) -> None:
    global _mode, _received, _is_interrupted
    request = SIGNALS[signal.Signals(number)]
    _received = max(_received, request)
    is_again, _is_interrupted = _is_interrupted, _is_interrupted or request is Request.INTERRUPT
    is_impatient = is_again and request is Request.INTERRUPT
    if _mode is _Mode.ENDING or (_mode is _Mode.STOPPING and request is Request.INTERRUPT):
        os._exit(exit_code(Stopped(request)))
    if _mode is _Mode.RAISING or (_mode is _Mode.NOTING and is_impatient):
        _mode = _Mode.STOPPING
        raise Stopped(request)
    if _mode is _Mode.NOTING and request is Request.INTERRUPT:
        _say("saving after the present step; Ctrl-C once more ends now, without saving")


class _Again:
    """Python drops what is raised in a destructor, or around a fork: raise it once more where it counts.

    Args:
        earlier: Told of all other exceptions that are dropped.
    """

    def __init__(self, earlier: Callable[[sys.UnraisableHookArgs], Any]) -> None:
        self._earlier = earlier

    def __call__(self, dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        else:
            self._earlier(dropped)


def _raise_again(_: int, __: FrameType | None) -> None:
    raise Stopped(_received)


def exit_code(stop: Stopped) -> int:
    """Say how a process ends, and put its SLURM job back in line where that was asked for.

    Call it last: SLURM may end the job at once.

    Returns:
        128 + the signal's number; 0 where the job is back in line, or nobody watches this process.
    """
    global _mode
    _mode = _Mode.STOPPING
    number = _signal_of(stop.request)
    _say(f"{number.name}: {stop.said}")
    if stop.request is Request.REQUEUE and "SLURM_JOB_ID" in os.environ:
        return 0 if _is_requeued_by_rank_0(stop) or _requeue() else 128 + number
    return 128 + number if stop.is_watched else 0


def _is_requeued_by_rank_0(stop: Stopped) -> bool:
    """Whether to leave it to rank 0, which srun would end before it has asked where this one failed."""
    if _is_rank_0() or stop.is_agreed:
        return not _is_rank_0()
    time.sleep(
        _RANK_0_S
    )  # in which SLURM ends this process, unless rank 0 waits for it where no signal counts
    return False


def _signal_of(request: Request) -> signal.Signals:
    return next(number for number, meaning in SIGNALS.items() if meaning is request)


def _requeue() -> bool:
    """Put this SLURM job back in line; returns whether SLURM did."""
    job = os.environ["SLURM_JOB_ID"]
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"job {job} is not requeued ({error}): start the same command again")
        return False
    _say(f"job {job} is requeued")
    return True


def _is_rank_0() -> bool:
    """Whether no launcher calls this process another than the first; some are not there yet to be asked."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _say(text: str) -> None:
    """A line on stderr, past Python's buffers, which a signal may have found in use."""
    if _is_rank_0():
        os.write(2, f"{text}\n".encode())


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Have child processes that are started inside never see these signals; the own wait until it is left.

    SLURM, and a terminal, signal every process; what becomes of a child is for its parent to say.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
