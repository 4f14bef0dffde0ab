"""CSV files of a run directory, read with one clear line about what is wrong with one."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cpq_train.common.errors import UserError

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
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        try:
            missing = sorted(set(columns) - set(rows.fieldnames or ()))
            parsed = [] if missing else list(map(parse, rows))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not readable as text ({error})") from error
        except (TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{path}: line {rows.line_num} is not readable ({error})") from error
    if missing:
        raise UserError(f"{path}: columns {missing} are missing; accepted: {', '.join(columns)}")
    return parsed
