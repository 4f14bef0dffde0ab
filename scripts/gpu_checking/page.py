"""docs/gpu.md, made of docs/gpu.json; nothing in it is written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from results import Row, table_of

from gpu_checking.guard import PASSED, Part
from gpu_checking.parts import BOUNDS, PARTS

NOT_RUN = "not run"

_HEAD = """# On a GPU

    bash scripts/gpu_check.sh

runs everything below on one GPU, in eight minutes by design, without a network, and writes this page and
its record, `docs/gpu.json`: no figure is written by hand. A part that fails is told and the others run;
what would begin after seven and a half minutes is skipped. The command ends with code 1 where a part
failed or numbers differ; a bound that is passed is told below. With `--device cpu --output FOLDER` all of it
runs small: that says nothing of a GPU, only that the check itself works.

"""


def page_of(record: Mapping[str, Any] | None) -> str:
    """The page.

    Args:
        record: What gpu_check.py wrote; None where it never ran.
    """
    if record is None:
        where = "Not run: no GPU has been at hand.\n\n"
        outcomes: Mapping[str, Any] = {part.name: {"result": NOT_RUN} for part in PARTS}
    else:
        where, outcomes = _where(record), record["parts"]
    sections = "".join(_section(part, outcomes[part.name]) for part in PARTS)
    page = f"{_HEAD}{where}{summary_of(outcomes)}\n## Bounds\n\n{_bounds(outcomes)}\n{sections}"
    return page.rstrip() + "\n"


def summary_of(outcomes: Mapping[str, Any]) -> str:
    """A row a part: what became of it."""
    rows: list[Row] = [
        {"part": part.title, "result": _result(outcomes[part.name]), "s": outcomes[part.name].get("seconds")}
        for part in PARTS
    ]
    return table_of(rows)


def _result(outcome: Mapping[str, Any]) -> str:
    message = outcome.get("message")
    return f"{outcome['result']}: {_in_a_cell(message)}" if message else outcome["result"]


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _where(record: Mapping[str, Any]) -> str:
    facts = {name: record[name] for name in ("date", "commit", "seconds")}
    facts |= {name: value for name, value in record["device"].items() if name != "name"}
    facts |= record["versions"]
    return f"{record['device']['name']}: " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".\n\n"


def _bounds(outcomes: Mapping[str, Any]) -> str:
    rows: list[Row] = []
    for bound in BOUNDS:
        measured = outcomes[bound.part].get("rows")
        reached = bound.figure(measured) if measured else None
        holds = NOT_RUN if reached is None else "yes" if reached <= bound.limit else "no"
        rows.append({"figure": bound.title, "bound": bound.limit, "reached": reached, "holds": holds})
    return table_of(rows)


def _section(part: Part, outcome: Mapping[str, Any]) -> str:
    told = "" if outcome["result"] == PASSED else _result(outcome)
    blocks = [f"## {part.title}", part.meaning, told, table_of(outcome.get("rows", [])).rstrip()]
    return "".join(f"{block}\n\n" for block in blocks if block)
