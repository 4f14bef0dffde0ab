"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console

LOG_WIDTH = 180
"""Columns of a log file, which has no window to fit."""


def table_console() -> Console:
    """As wide as its window; wide enough for names of layers where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)
