"""Tables of texts, and numbers as they stand in them."""

from __future__ import annotations

from dataclasses import dataclass

NONE = "n/a"
CODE = "`([^`]+)`"
"""What stands between backticks in a text of the report."""


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]


def code(name: str) -> str:
    """A name that is shown as code: in backticks, unless it has one itself."""
    return name if "`" in name else f"`{name}`"


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or that there is none."""
    return NONE if value is None else format(value, form)
