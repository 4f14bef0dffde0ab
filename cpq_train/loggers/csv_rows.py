"""CSV files that grow during a run and of which a resumed run drops the rows that come again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpq_train.common.csv_files import csv_rows
from cpq_train.common.errors import UserError
from cpq_train.common.files import append_whole, check_regular, write_whole
from cpq_train.common.text import in_cell, in_row

Row = dict[str, Any]


def rows_before(path: Path, global_step: int) -> list[Row]:
    """The rows of the steps before `global_step`; those from it on come again in a resumed run."""
    return [row for row in read_rows(path) if int(row["step"]) < global_step]


def read_rows(path: Path) -> list[Row]:
    """The rows written in full; none where there is no file.

    Raises:
        UserError: It is not what `write_rows` and `append_rows` write.
    """
    whole = _text_of(path)
    whole = whole[: whole.rfind("\n") + 1]
    rows: list[Row] = []
    for number, row in csv_rows(io.StringIO(whole, newline=""), ("step",), str(path)) if whole else ():
        if not row["step"].isdecimal():
            accepted = "a count; move the file away to begin a new one"
            raise UserError(f"{path}: line {number}, step is {row['step']!r}; accepted: {accepted}")
        rows.append(dict(row))
    return rows


def _text_of(path: Path) -> str:
    if not path.exists():
        return ""
    check_regular(path, "table")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as text ({error})") from error


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file, which gets a header when it is new.

    They are written in one piece, or taken back: a killed process and a full disk leave whole rows.
    """
    text = _text(columns, rows)
    if path.is_file():
        append_whole(path, text)
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
    return _text(columns, [{name: in_cell(name) for name in columns}])


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerows(map(in_row, rows))
    return out.getvalue()
