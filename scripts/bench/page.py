"""Makes the tables of docs/performance.md from the files of results; prose stays as it is.

    python scripts/bench/page.py

Between `<!-- table: NAME -->` and `<!-- end -->` comes the table NAME of every machine that has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import markdown, read_all

from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with its tables made anew.

    Args:
        text: The page.
        results: Machine -> table -> context and rows.

    Raises:
        UserError: No machine has one of the tables.
    """

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        found = [tables[name] for tables in results.values() if name in tables]
        if not found:
            known = sorted({table for tables in results.values() for table in tables})
            raise UserError(f"table {name!r} is in no file of results; accepted: {', '.join(known)}")
        return f"{begin}{''.join(map(markdown, found))}{end}"

    return _TABLE.sub(fill, text)


if __name__ == "__main__":
    write_whole(PAGE, filled(PAGE.read_text(), read_all()))
