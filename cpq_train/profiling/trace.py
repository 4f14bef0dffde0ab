"""A Chrome trace of one pass (chrome://tracing, https://ui.perfetto.dev), layers above their operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cpq_train.profiling.instrument import Part


class TraceObserver:
    """Marks every part in the trace of `torch.profiler`."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, part: Part) -> None:
        """See `Observer`."""
        name = part.name if part.name == part.kind else f"{part.name} ({part.kind})"
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def leave(self, part: Part, output: Any) -> None:
        """See `Observer`."""
        self._open.pop().__exit__(None, None, None)


def write_trace(
    path: Path, run: Callable[[], Any], observe: Callable[[TraceObserver], AbstractContextManager[None]]
) -> None:
    """Record a pass with torch's profiler, whose own cost makes its times longer than those of `latency`."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded, observe(TraceObserver()):
        run()
    recorded.export_chrome_trace(str(path))
