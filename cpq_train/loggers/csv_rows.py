"""CSV files that grow during a run and of which a resumed run drops the rows that come again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpq_train.common.files import write_whole

Row = dict[str, Any]


def rows_before(path: Path, global_step: int) -> list[Row]:
    """The rows of the steps before `global_step`; those from it on come again in a resumed run."""
    return [row for row in read_rows(path) if int(row["step"]) < global_step]


def read_rows(path: Path) -> list[Row]:
    """The rows written in full; none where there is no file."""
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole)))


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which gets a header when it is new.

    They are written in one piece: a killed process leaves whole rows.
    """
    text = _text(columns, rows)
    if path.is_file():
        with path.open("a", newline="") as file:
            file.write(text)
    else:
        _replace(path, _header(columns) + text)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file at once; without rows there is none."""
    if rows:
        _replace(path, _header(columns) + _text(columns, rows))
    else:
        path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _header(columns: Sequence[str]) -> str:
    return _text(columns, [dict(zip(columns, columns, strict=True))])


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n").writerows(rows)
    return out.getvalue()
