"""`amax_drift.csv`: how the ranges of a run moved while it was tuned.

One row for each quantizer and recorded step: `step, quantizer, amax, start_amax, clipped_share, sqnr_db`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cpq_train.report.csv_table import bounded, read_table

AMAX_DRIFT_FILE = "amax_drift.csv"
AMAX_DRIFT_PICTURE = "amax_drift.png"
LEAST_LIMIT = 0.01
"""Of a scale of colours: what moved by less than 0.7 % looks unchanged."""

_LARGEST = 3.41e38
"""Of float32, rounded up."""
_UNKNOWN = ("", "nan", "inf", "-inf")

_COLUMNS = ("step", "quantizer", "amax", "start_amax", "clipped_share", "sqnr_db")


@dataclass(frozen=True)
class Reading:
    """A quantizer at a step; a number that was not measured is None.

    Attributes:
        drift: log2(amax / its value at the start): 1 is twice as wide, -1 half.
        clipped_share: share of the tensor's values beyond amax.
        sqnr_db: signal to quantization noise, dB.
    """

    drift: float | None
    clipped_share: float | None
    sqnr_db: float | None


History = dict[str, dict[int, Reading]]
"""Quantizer -> step -> reading, in the order of the file."""


def read_amax_history(path: Path) -> History:
    """Read `amax_drift.csv`.

    Raises:
        UserError: The file lacks a column, or a value is no number.
    """
    history: History = defaultdict(dict)
    for quantizer, step, reading in read_table(path, _COLUMNS, _row):
        history[quantizer][step] = reading
    return dict(history)


def _row(row: dict[str, str]) -> tuple[str, int, Reading]:
    return row["quantizer"], int(bounded(row, "step")), _reading(row)


def _reading(row: dict[str, str]) -> Reading:
    amax, start = _measured(row, "amax", 0, _LARGEST), _measured(row, "start_amax", 0, _LARGEST)
    drift = math.log2(amax / start) if amax and start else None
    clipped, sqnr_db = _measured(row, "clipped_share", 0, 1), _measured(row, "sqnr_db", -1e4, 1e4)
    return Reading(drift, clipped, sqnr_db)


def _measured(row: dict[str, str], name: str, least: float, most: float) -> float | None:
    """A number within its bounds, or none where the cell is empty or says inf."""
    if row[name] in _UNKNOWN:
        return None
    value = float(row[name])
    if not least <= value <= most:
        raise ValueError(f"{name} is {row[name]}; accepted: a number from {least:g} to {most:g}, or nothing")
    return value


def most_moved(history: History, at_most: int) -> list[str]:
    """Quantizers whose ranges moved furthest at any step, in the order of the file."""
    reach = {
        name: max((abs(reading.drift or 0.0) for reading in readings.values()), default=0.0)
        for name, readings in history.items()
    }
    kept = set(sorted(reach, key=lambda name: -reach[name])[:at_most])
    return [name for name in history if name in kept]


@dataclass(frozen=True)
class DriftMap:
    """What a heat map of moved ranges shows: a row per quantizer, a column per step.

    Attributes:
        names: Quantizers.
        steps: Steps at which any of them was measured.
        drifts: See `Reading`; a list for each quantizer.
        limit: The absolute drift of full colour.
    """

    names: list[str]
    steps: list[int]
    drifts: list[list[float | None]]
    limit: float


def drift_map(history: History, names: Sequence[str], max_steps: int | None = None) -> DriftMap | None:
    """The map of some quantizers; None where they were not measured.

    Args:
        history: See `read_amax_history`.
        names: Quantizers, of whom those without a range at any step are left out.
        max_steps: Of more steps every n-th is shown.
    """
    kept = [name for name in names if any(r.drift is not None for r in history[name].values())]
    steps = sorted({step for name in kept for step in history[name]})
    if not steps:
        return None
    steps = steps[:: -(-len(steps) // (max_steps or len(steps)))]
    drifts = [[r.drift if (r := history[name].get(step)) else None for step in steps] for name in kept]
    largest = max((abs(drift) for line in drifts for drift in line if drift is not None), default=0.0)
    return DriftMap(kept, steps, drifts, max(largest, LEAST_LIMIT))


def last_of_most_moved(history: History, at_most: int) -> dict[str, dict[str, float | None]]:
    """The last readings of the quantizers whose ranges moved furthest, as plain values."""
    return {name: asdict(history[name][max(history[name])]) for name in most_moved(history, at_most)}
