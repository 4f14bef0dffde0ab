"""Signals that ask a run to stop: they are noted, and obeyed between two steps."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn


class Request(IntEnum):
    """What was asked for; where ranks were asked for different things the largest holds."""

    NONE = 0
    STOP = 1
    """SIGTERM: save and stop."""
    REQUEUE = 2
    """SIGUSR1, which SLURM sends some time before a job's end: save, stop and put the job back in line."""


_SIGNALS = {signal.SIGTERM: Request.STOP, signal.SIGUSR1: Request.REQUEUE}

# Signals belong to the process, and so does what was received.
_received = Request.NONE


class Preempted(SystemExit):
    """The run was saved and ends because it was asked to.

    Args:
        request: Who asked.
        is_watched: Whether this process' exit code says how the run ended.
    """

    def __init__(self, request: Request, is_watched: bool) -> None:
        number = next(number for number, meaning in _SIGNALS.items() if meaning is request)
        super().__init__(128 + number if is_watched else 0)
        self.request = request


@contextmanager
def noting_signals() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 instead of dying of them; the earlier handlers come back afterwards."""
    global _received
    _received = Request.NONE
    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets handlers in the main thread only
        return
    earlier = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _note(number: int, _: FrameType | None) -> None:
    global _received
    _received = max(_received, _SIGNALS[signal.Signals(number)])


def received() -> Request:
    """What this process was asked for since `noting_signals` began."""
    return _received


def is_started_by_rank_0(trainer: Trainer) -> bool:
    """Whether Lightning's own launcher started this process, as a child of rank 0 of its node."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0


def requeue() -> bool:
    """Put this SLURM job back in line.

    Returns:
        Whether SLURM did; False where the process belongs to no SLURM job.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(f"job {job} is saved but not requeued ({error}): start the same command again")
        return False
    return True
