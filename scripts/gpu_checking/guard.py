"""One part of the check: what it is, and how it is run so that nothing it does stops the others."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from results import Row

from gpu_checking.setting import Setting

PASSED, FAILED, SKIPPED, NOT_APPLICABLE = "passed", "failed", "skipped", "not applicable"
OUT_OF_TIME = "out of time"

LONGEST_MESSAGE = 600

T = TypeVar("T")


class NotApplicable(Exception):
    """There is nothing to measure on this machine."""


@dataclass(frozen=True)
class Found:
    """What a part measured.

    Attributes:
        rows: A table.
        wrong: What differs or failed, a line each.
    """

    rows: Sequence[Row]
    wrong: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        name: Its key in the record.
        title: Of its section.
        meaning: What its figures are, in Markdown.
        run: Measures.
    """

    name: str
    title: str
    meaning: str
    run: Callable[[Setting], Found]


def each(names: Iterable[str], run: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
    """Run what is the same for several arms, so that one that fails does not take the others along.

    Returns:
        What was found by name; what failed, a line each.
    """
    found, wrong = {}, []
    for name in names:
        try:
            found[name] = run(name)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{name}: {_named(error)}")
    return found, wrong


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass
class Outcome:
    """What became of a part; plain values in the record.

    Attributes:
        result: passed, failed, skipped or not applicable.
        message: Why; empty where it passed.
        seconds: What it took.
        rows: What it measured.
    """

    result: str
    message: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_guarded(part: Part, setting: Setting) -> Outcome:
    """Run a part; whatever it raises becomes its outcome."""
    if setting.seconds_left() <= 0:
        return Outcome(SKIPPED, OUT_OF_TIME)
    start_s = time.perf_counter()
    outcome = _outcome(part, setting)
    outcome.seconds = round(time.perf_counter() - start_s, 1)
    return outcome


def _outcome(part: Part, setting: Setting) -> Outcome:
    try:
        found = part.run(setting)
    except NotApplicable as reason:
        return Outcome(NOT_APPLICABLE, str(reason))
    except Exception as error:  # a broken part is told, and the others run
        traceback.print_exc()
        return Outcome(FAILED, setting.without_paths(_named(error))[:LONGEST_MESSAGE])
    wrong = setting.without_paths("; ".join(found.wrong))[:LONGEST_MESSAGE]
    rows = json.loads(json.dumps(found.rows), parse_constant=str)  # JSON has no infinite numbers
    return Outcome(FAILED if wrong else PASSED, wrong, rows=rows)
