"""The one way to print: tables and sentences of which every character is text.

Nothing in a name is markup, an emoji code, a colour or a command to the terminal.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from cpq_train.common.text import visible

LOG_WIDTH = 180
"""Columns of a log file, which has no window to fit."""

_KEPT = "\n\t"


class _PlainConsole(Console):
    """Takes every string, those in tables too, as it is; its control characters are shown."""

    @override
    def render_str(self, text: str, **how: Any) -> Text:
        how = {name: how[name] for name in ("style", "justify", "overflow") if name in how}
        return Text(visible(text, _KEPT), **how)


def new_console(stderr: bool = False) -> Console:
    """As wide as its window; wide enough for names of layers where there is none."""
    console = _PlainConsole(stderr=stderr)
    return console if console.is_terminal else _PlainConsole(stderr=stderr, width=LOG_WIDTH)


def print_plain(*parts: Table | str, style: str | None = None, stderr: bool = False) -> None:
    """Print tables, and sentences that only the terminal folds.

    Args:
        parts: One after another.
        style: Colour of all of them.
        stderr: There, not on stdout, which has the results of a verb.
    """
    console = new_console(stderr)
    for part in parts:
        console.print(part, style=style, soft_wrap=isinstance(part, str))


class _PlainRecord(logging.LogRecord):
    @override
    def getMessage(self) -> str:
        return visible(super().getMessage(), _KEPT)


@contextmanager
def plain_messages() -> Iterator[None]:
    """Show the control characters of warnings and log records too, whoever they come from.

    To be entered when everything is imported: Lightning puts its own form of warnings in place.
    """
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning

    def plain(*args: Any, **more: Any) -> str:
        return visible(form(*args, **more), _KEPT)

    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = plain
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form
