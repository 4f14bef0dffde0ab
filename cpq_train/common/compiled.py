"""Loops in Python that Numba compiles, once for each machine: what it made is kept beside the source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function in machine code, which holds no lock of Python's while it runs and checks no index."""
    settings = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
    return cast(F, njit(**settings)(function))
