"""CSV files of a run directory: rows that are whole, under the columns that they should have."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from cpq_train.common.errors import UserError, shown
from cpq_train.common.text import from_cell

Row = dict[str, str]


def csv_rows(lines: Iterable[str], columns: Sequence[str], where: str) -> Iterator[tuple[int, Row]]:
    """Number of the line and cells of each row, which `in_cell` wrote.

    Args:
        lines: Of the file, with their ends.
        columns: Those it must have; it may have others.
        where: The file, for the message.

    Raises:
        UserError: The file is no text, lacks a column or has one twice, or a row is cut, too long or no CSV.
    """
    reader = csv.reader(_whole(lines, where), strict=True)
    try:
        header = _header(next(reader, []), columns, where)
        for cells in filter(None, reader):
            if len(cells) != len(header):
                accepted = f"a cell for each of {', '.join(header)}"
                raise UserError(
                    f"{where}: line {reader.line_num} is not readable "
                    f"({len(cells)} cells: {shown(cells)}); accepted: {accepted}"
                )
            yield reader.line_num, dict(zip(header, map(from_cell, cells), strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not readable as text ({error})") from error
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} is not readable ({error})") from error


def _header(names: list[str], columns: Sequence[str], where: str) -> list[str]:
    header = list(map(from_cell, names))
    missing = sorted(set(columns) - set(header))
    if missing:
        raise UserError(f"{where}: columns {missing} are missing; accepted: {', '.join(columns)}")
    if len(set(header)) < len(header):
        raise UserError(f"{where}: columns {shown(header)}; accepted: each of them once")
    return header


def _whole(lines: Iterable[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.endswith(("\n", "\r")):
            raise UserError(f"{where}: line {number} is cut: {shown(line)}; accepted: lines with their end")
        yield line
