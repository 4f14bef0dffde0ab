"""`training_step.json`: where the time of a training step goes, for several networks side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cpq_train.common.files import write_whole
from cpq_train.profiling.instrument import Part
from cpq_train.profiling.latency import Latency, PassTimes, summarise

SCHEMA = 1
TRAINING_STEP_FILE = "training_step.json"
REST, WHOLE, WHOLE_PLAIN = "unattributed", "whole, measured by part", "whole, without marks"


@dataclass(frozen=True)
class StepTimes:
    """The steps of one network.

    Attributes:
        by_part: Steps in which every part was timed.
        plain_ms: Steps beside them in which only the whole was.
    """

    by_part: list[PassTimes]
    plain_ms: list[float]

    def summary(self) -> Latency:
        """Medians and spreads; the parts are its layers."""
        return summarise(self.by_part, self.plain_ms, {})

    def parts(self) -> list[Part]:
        """In the order of the step."""
        return list(dict.fromkeys(part for times in self.by_part for part in times.own))


def step_document(context: Mapping[str, Any], networks: Mapping[str, StepTimes]) -> dict[str, Any]:
    """What `training_step.json` says, as plain values.

    Args:
        context: What was measured on what.
        networks: Name -> its steps.
    """
    return {
        "schema": SCHEMA,
        **context,
        "networks": [{"name": name, **_record(steps)} for name, steps in networks.items()],
    }


def write_steps(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `training_step.json` into a folder, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TRAINING_STEP_FILE, json.dumps(document, indent=2, allow_nan=False) + "\n")


def step_table(document: Mapping[str, Any]) -> Table:
    """A row a part, in the order of the step; a network's time, its share and its ratio to the first's."""
    networks = document["networks"]
    table = Table()
    table.add_column("part", no_wrap=True)
    for network in networks:
        for column in ("ms", "share", *(("ratio",) if network is not networks[0] else ())):
            table.add_column(f"{network['name']}: {column}" if column == "ms" else column, justify="right")
    times = [{row["name"]: row for row in network["parts"]} for network in networks]
    for name in _merged([list(rows) for rows in times]):
        table.add_row(name, *_cells([rows.get(name) for rows in times]))
    table.add_section()
    for name, key in ((REST, "unattributed"), (WHOLE, "whole"), (WHOLE_PLAIN, "plain")):
        table.add_row(name, *_cells([network[key] for network in networks]))
    return table


def _record(steps: StepTimes) -> dict[str, Any]:
    found = steps.summary()
    rows = {row.name: row for row in found.layers}
    return {
        "parts": [
            {"name": part.name, "kind": part.kind, **asdict(row.time), "share": row.share}
            for part in steps.parts()
            for row in [rows[part.name]]
        ],
        "unattributed": {**asdict(found.unattributed), "share": found.unattributed_share},
        "whole": {**asdict(found.whole), "share": 1.0},
        "plain": asdict(found.plain),
    }


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """Names in the order of the longest list; what only others have stands at the end."""
    longest = max(orders, key=len)
    return list(dict.fromkeys([*longest, *(name for names in orders for name in names)]))


def _cells(rows: Sequence[Mapping[str, float] | None]) -> list[str]:
    cells = []
    for number, row in enumerate(rows):
        cells.append("" if row is None else f"{row['ms']:,.1f}")
        cells.append("" if row is None or "share" not in row else f"{row['share']:.1%}")
        if number:
            first = rows[0]
            cells.append(f"{row['ms'] / first['ms']:.2f}" if row and first and first["ms"] > 0 else "")
    return cells
