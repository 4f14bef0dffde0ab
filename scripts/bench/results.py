"""One file a machine, `results/<machine>.json`: what every script measured there last, a key a table.

    {"qat_overhead": {"context": {...}, "rows": [{"network": "full", ...}]}, ...}

A cell is a word, a number, null, or a spread: `{"median": 2.0, "min": 1.9, "max": 2.2}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from machine import describe, machine_name

from cpq_train.common.files import write_whole

FOLDER = Path(__file__).resolve().parent / "results"

Cell = str | int | float | dict[str, float] | None
Row = Mapping[str, Cell]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, four digits of each."""
    named = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in named.items()}


def write_rows(table: str, rows: Sequence[Row], device: str = "cpu", **context: Any) -> None:
    """Put a table into this machine's file, in place of the one that was there, and print it.

    Args:
        table: Its name: that of the script, or begins with it.
        rows: All with the same columns.
        device: cpu, or cuda: then the machine is the GPU.
        context: How it was measured, beside machine and versions.
    """
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{_slug(machine_name(device))}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[table] = {"context": {**describe(device), **context}, "rows": list(rows)}
    write_whole(path, json.dumps(dict(sorted(known.items())), indent=1, allow_nan=False) + "\n")
    print(f"{table}, {path}:\n{markdown(known[table])}")


def read_all() -> dict[str, dict[str, Any]]:
    """Name of a file without its ending -> what it holds."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def markdown(table: Mapping[str, Any]) -> str:
    """A table as Markdown, and below it what it was measured on.

    Args:
        table: Context and rows, as the files have them.
    """
    return f"\n{table_of(table['rows'])}\n{_caption(table['context'])}\n\n"


def table_of(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; nothing where there are none.

    Args:
        rows: All with the same columns.
    """
    columns = list(rows[0]) if rows else []
    is_number = [not any(isinstance(row[column], str) for row in rows) for column in columns]
    lines = [
        columns,
        ["--:" if right else "---" for right in is_number],
        *([_text(row[column]) for column in columns] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines if line)


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, dict):
        return f"**{_text(cell['median'])}** ({_text(cell['min'])} to {_text(cell['max'])})"
    if isinstance(cell, float):
        return f"{cell:,.2f}" if abs(cell) < 100 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _caption(context: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    sets = ", ".join(context["instruction_sets"])
    own = ("machine", "instruction_sets", "threads", "versions")
    rest = "".join(f"; {name} {value}" for name, value in context.items() if name not in own)
    return f"{context['machine']} ({sets}), threads {context['threads']}{rest}; {versions}."
