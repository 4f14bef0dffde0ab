"""Checks of `compare --fail_if`: what no score may be, as a person writes it for a machine to run.

An expression is `[ROW.]METRIC[:CLASS] < or > NUMBER, ROW, ROW + NUMBER or ROW - NUMBER`. Without a row on the
left it is of every run but those of the row on the right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cpq_train.common.arm_names import ROWS
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.metrics_file import METRICS, Document
from cpq_train.report.runs import Run, relative
from cpq_train.report.tables import Table, code, number

METRICS_OF_CLASSES: Final = ("AP", *TP_ERRORS)
ALL_CLASSES: Final = "*"

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM: Final = re.compile(
    r"\s*(?:(?P<row>\w+)\s*\.\s*)?(?P<metric>[A-Za-z]\w*)\s*(?::\s*(?P<of_class>[^\s<>:](?:[^<>:]*[^\s<>:])?)\s*)?"
    rf"(?P<sign>[<>])\s*(?:(?P<number>[+-]?\s*{_NUMBER})"
    rf"|(?P<against>[A-Za-z]\w*)\s*(?P<offset>[+-]\s*{_NUMBER})?)\s*"
)


@dataclass(frozen=True)
class Expression:
    """What no score may be.

    Attributes:
        text: As it was written.
        row: Whose scores; None for every run but those of `against`.
        metric: One of `METRICS`, or with a class one of `METRICS_OF_CLASSES`.
        of_class: A class, `ALL_CLASSES`, or None.
        sign: "<" or ">": on which side of the bound a score fails.
        against: The row whose score is the bound, less or more `number`; None where `number` is the bound.
        number: See there.
    """

    text: str
    row: str | None
    metric: str
    of_class: str | None
    sign: str
    against: str | None
    number: float


def read_expression(text: str) -> Expression:
    """Read an expression.

    Raises:
        UserError: It is none, or names a row or a metric that does not exist.
    """
    found = _FORM.fullmatch(text)
    said = "" if found is None else re.sub(r"\s", "", found["number"] or found["offset"] or "0")
    if found is None or not math.isfinite(float(said)):
        raise UserError(
            f"fail_if {text!r} is not readable; accepted: [ROW.]METRIC[:CLASS], < or >, and NUMBER, ROW, "
            "ROW+NUMBER or ROW-NUMBER, such as 'mAP<float-0.01', 'qat.NDS<0.6', 'AP:car<float-0.02'"
        )
    row, metric, of_class = found["row"], found["metric"], found["of_class"]
    for name in (row, found["against"]):
        if name not in (None, *ROWS):
            raise UserError(f"fail_if {text!r} names row {name!r}; accepted: {', '.join(ROWS)}")
    if row is not None and row == found["against"]:
        raise UserError(f"fail_if {text!r} measures {row} against itself; accepted: two rows")
    _check_metric(text, metric, of_class)
    return Expression(text, row, metric, of_class, found["sign"], found["against"], float(said))


def _check_metric(text: str, metric: str, of_class: str | None) -> None:
    if metric in (METRICS if of_class is None else METRICS_OF_CLASSES):
        return
    of_classes = ", ".join(f"{name}:CLASS" for name in METRICS_OF_CLASSES)
    seen = metric if of_class is None else f"{metric}:{of_class}"
    raise UserError(
        f"fail_if {text!r} names metric {seen!r}; accepted: {', '.join(METRICS)}; {of_classes}, "
        f"where CLASS may be {ALL_CLASSES}, every class"
    )


def check(expression: Expression, runs: Sequence[Run]) -> list[Document]:
    """Look at the scores of runs.

    Returns:
        What `report.json` says of each: "expression", "run" (its title), "metric", "class", "value", "sign",
        "bound", "against" (the title of the run that the bound is of) and "failed"; null where there is none.

    Raises:
        UserError: The expression names no run, no class, or a score that a class does not have.
    """
    row, against = expression.row, expression.against
    chosen = [run for run in runs if (run.arm != against if row is None else run.arm == row)]
    if not chosen:
        held = ", ".join(run.title for run in runs)
        who = row or f"any row but {against}"
        raise UserError(f"fail_if {expression.text!r} names no run: {who} is not among {held}")
    return [document for run in chosen for document in _of_run(expression, run, runs)]


def _of_run(expression: Expression, run: Run, runs: Sequence[Run]) -> Iterator[Document]:
    other = None
    if expression.against is not None:
        other, why = relative(run, runs, expression.against)
        if other is None:
            raise UserError(f"fail_if {expression.text!r}, {run.title}: {why}")
    for of_class in _classes(expression, run, other):
        value, bound = _score(expression, run, of_class), expression.number
        bound += 0.0 if other is None else _score(expression, other, of_class)
        yield {
            "expression": expression.text,
            "run": run.title,
            "metric": expression.metric,
            "class": of_class,
            "value": value,
            "sign": expression.sign,
            "bound": bound,
            "against": None if other is None else other.title,
            "failed": value < bound if expression.sign == "<" else value > bound,
        }


def _classes(expression: Expression, run: Run, other: Run | None) -> list[str | None]:
    """The classes that an expression is of; None where it is of none."""
    of_class, both = expression.of_class, [run] if other is None else [run, other]
    if of_class is None:
        return [None]
    known = [
        name for name in run.metrics["per_class"] if all(name in one.metrics["per_class"] for one in both)
    ]
    defined = [name for name in known if all(_of_class(expression, one, name) is not None for one in both)]
    if of_class == ALL_CLASSES and defined:
        return list(defined)
    if of_class not in defined:
        why = f"{expression.metric} of {of_class!r}" if of_class in known else f"class {of_class!r}"
        raise UserError(f"fail_if {expression.text!r}: there is no {why}; accepted: {', '.join(defined)}")
    return [of_class]


def _of_class(expression: Expression, run: Run, name: str) -> float | None:
    found = run.metrics["per_class"][name][expression.metric]
    value: float | None = found["mean"] if expression.metric == "AP" else found
    return value


def _score(expression: Expression, run: Run, of_class: str | None) -> float:
    whole = run.metrics["metrics"]
    value = whole[expression.metric] if of_class is None else _of_class(expression, run, of_class)
    if value is None:  # of a class `_classes` leaves it out
        has = ", ".join(name for name, score in whole.items() if score is not None)
        raise UserError(
            f"fail_if {expression.text!r}: {run.title} has no {expression.metric}; accepted: {has}"
        )
    return float(value)


def check_table(report: Document) -> Table:
    """A row for each score that was looked at."""
    rows = [
        [
            code(one["expression"]),
            one["run"],
            one["metric"] if one["class"] is None else f"{one['metric']} of {one['class']}",
            number(one["value"]),
            f"{'not below' if one['sign'] == '<' else 'not above'} {number(one['bound'])}",
            "FAILED" if one["failed"] else "passed",
        ]
        for one in report["checks"]
    ]
    return Table("Checks", ["fail if", "arm", "score", "value", "accepted", "result"], rows)
