"""The search for garbage, which imports of large libraries set off again and again."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """While open, no garbage is searched for: what an import makes is hardly ever any."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()


@contextmanager
def importing_for_good() -> Iterator[None]:
    """Import what a command needs until it ends: it is not searched for garbage, now or ever.

    The last searches, as the process ends, would take a second. Only for the command line: what else is in
    memory when modules were imported stays there too.
    """
    num_modules = len(sys.modules)
    with collection_paused():
        yield
    if len(sys.modules) > num_modules:
        gc.freeze()
