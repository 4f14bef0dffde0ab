"""Loops in Python that Numba compiles, once for each machine: what it made is kept beside the source.

Where that folder cannot be written to it is kept in NUMBA_CACHE_DIR or the user's cache; failing that, not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function in machine code, which holds no lock of Python's while it runs and checks no index."""
    settings = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return cast(F, njit(cache=True, **settings)(function))
    except RuntimeError:
        warnings.warn(
            "kernels are compiled again in every process, which takes seconds: their folder cannot be "
            "written to; accepted: one that can, in the environment variable NUMBA_CACHE_DIR",
            stacklevel=1,
        )
        return cast(F, njit(**settings)(function))
