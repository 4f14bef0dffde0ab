"""CSV files of a run directory, read with one clear line about what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cpq_train.common.csv_files import csv_rows
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_regular

Parsed = TypeVar("Parsed")


def read_table(path: Path, columns: Sequence[str], parse: Callable[[dict[str, str]], Parsed]) -> list[Parsed]:
    """What `parse` makes of each row of a file.

    Args:
        path: The file.
        columns: Those it must have; others are passed over.
        parse: May raise what `float("wide")` raises.

    Raises:
        UserError: The file is no text, lacks a column, or a line is not readable.
    """
    check_regular(path, "table")
    parsed = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in csv_rows(file, columns, str(path)):
            try:
                parsed.append(parse(row))
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not readable ({error})") from error
    return parsed


def bounded(row: dict[str, str], name: str, most: float = 1e15) -> float:
    """A number of a row: from 0 to `most`.

    Raises:
        ValueError: It is none.
    """
    value = float(row[name])
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {row[name]}; accepted: a number from 0 to {most:g}")
    return value
