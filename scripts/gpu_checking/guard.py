"""One part of the check: what it is, and how it is run so that nothing it does stops the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from results import Row

from gpu_checking.setting import Setting

PASSED, DIFFERS, FAILED, SKIPPED, NOT_APPLICABLE = "passed", "differs", "failed", "skipped", "not applicable"
BAD = (DIFFERS, FAILED)
OUT_OF_TIME = "out of time"

LONGEST_MESSAGE = 600


class NotApplicable(Exception):
    """There is nothing to measure on this machine."""


@dataclass(frozen=True)
class Found:
    """What a part measured.

    Attributes:
        rows: A table.
        wrong: What should not be, a line each.
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


@dataclass
class Outcome:
    """What became of a part; plain values in the record.

    Attributes:
        result: passed, differs, failed, skipped or not applicable.
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
        return Outcome(FAILED, setting.without_paths(f"{type(error).__name__}: {error}")[:LONGEST_MESSAGE])
    wrong = setting.without_paths("; ".join(found.wrong))[:LONGEST_MESSAGE]
    return Outcome(DIFFERS if wrong else PASSED, wrong, rows=list(found.rows))
