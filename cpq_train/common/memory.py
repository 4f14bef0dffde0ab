"""What becomes of memory that arrays have left."""

from __future__ import annotations

import ctypes
import os
from typing import Final

# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3

_KEPT: Final = 2**30
_LARGEST_OF_OLD: Final = 2**25
"""What glibc before 2.35 takes for the threshold of mmap."""


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed arrays, for the next ones.

    By itself glibc gives a large array back to the system, which clears its pages for the next one: thousands
    of page faults in a training step. The process stays about as large as it was at its largest, and at most
    1 GiB lies idle at the end of its heap (`docs/performance.md`). Processes that are forked do the same.

    Nothing happens with another C library, nor where the environment has settings of its own for malloc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or _has_own_settings():
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    if not mallopt(_M_MMAP_THRESHOLD, _KEPT):
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD)


def _has_own_settings() -> bool:
    names_one = any(name.startswith("MALLOC_") for name in os.environ)
    return names_one or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
