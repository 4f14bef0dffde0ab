"""Names that strangers chose, as text: one escape for each medium that would take a part of them for more.

Run folders, checkpoints, arms, schemes, layers, scenes and tokens are named by whoever made the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any, Final

_MARKUP: Final = re.compile(
    r"[\\`*<>|&~$]|\](?=[(\[:])|^[-+=#](?!\d)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    r"|:(?=//)|(?<=www)\.|(?<=\w)@(?=\w)"
)
"""What Markdown reads as more than text. Brackets alone, and an underscore between letters, it does not."""

_FORMULA: Final = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""How a cell begins that a spreadsheet computes, or one that `in_cell` has marked already.

OWASP, "CSV Injection" (https://owasp.org/www-community/attacks/CSV_Injection).
"""


def visible(text: str, kept: str = "") -> str:
    """A text with its control characters, bidirectional marks and broken characters as Python writes them.

    Args:
        text: Any.
        kept: Of such characters, those that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def in_markup(text: str) -> str:
    """A text in HTML or SVG: content, or an attribute in double quotes."""
    return escape(visible(text))


def in_markdown(text: str) -> str:
    """A text in a line of Markdown, or in a cell of its tables."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def in_markdown_code(text: str) -> str:
    """A text as code in Markdown, or as text where something in it ends code or a cell of a table."""
    return in_markdown(text) if set("`<>|&") & set(text) or not text.isprintable() else f"`{text}`"


def in_cell(value: Any) -> Any:
    """A value in a CSV file: a text that a spreadsheet would compute gets an apostrophe; numbers stay."""
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return f"'{value}"
    return value


def from_cell(text: str) -> str:
    """The text that `in_cell` made this of."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def in_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`in_cell` for the values of a row."""
    return {name: in_cell(value) for name, value in row.items()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
