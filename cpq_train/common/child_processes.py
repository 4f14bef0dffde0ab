"""What child processes do that work for this one: they leave signals to it, and end with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the system end this process when its parent has ended, in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_parent() -> None:
    """Leave signals to the parent, and end when it ends or says so: the first thing a worker does.

    Started inside `common.signals.signals_blocked` it has none of them to lose. SIGTERM is the parent's way
    of ending a worker (`DataLoader`, `multiprocessing`), and the system's of ending every process of a job:
    only the parent's counts.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with_parent()
    if os.getppid() != parent.pid:  # it ended before the system knew
        os._exit(1)
    threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()


def _end_when_told(parent: int | None) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
