"""What runs cost: their size and memory, and the times of a pass that were measured in turn.

Times of separate processes stand in no table: they differ by what else the machine did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired

from cpq_train.common.schema import accepts, keys, validated
from cpq_train.evaluation.metrics_file import Document
from cpq_train.evaluation.run_files import METRICS_FILE
from cpq_train.report.runs import Run
from cpq_train.report.tables import NONE, Table, number

_COSTS = (
    "num_parameters",
    "float_bytes",
    "stored_bytes",
    "engine_file_bytes",
    "num_macs",
    "evaluation_peak_bytes",
    "training_peak_bytes",
    "saved_bytes",
)
"""What a report shows of `profile`; names carry their units."""

_Cost = Annotated[
    float | None, Field(strict=True, ge=0, le=1e18), accepts("null or a finite number from 0 on")
]
_KIND: TypeAdapter[Any] = TypeAdapter(keys(dict.fromkeys(_COSTS, NotRequired[_Cost])))

_WHAT_TIMES_ARE = (
    "Fake quantization in PyTorch computes integers in floating point or with oneDNN: it is what training "
    "costs, not what a vehicle pays. Only rows that run as an engine are deployment figures."
)


def describe_costs(run: Run, baseline: Run | None, latency: Document | None) -> Document:
    """What `report.json` says of the costs of a run.

    Args:
        run: The run.
        baseline: The float run that it came from, where there is one.
        latency: Contents of `latency.json`, where they are given.

    Returns:
        "profile", that of `metrics.json` with what was measured beside the times, and "latency", the row of
        the run with the ratio of its time to that of float; null where it has none.
    """
    _check(run.metrics["profile"], f"{run.folder / METRICS_FILE}, profile")
    row, of_float = _row(run, latency), None if baseline is None else _row(baseline, latency)
    if row is None:
        return {"profile": run.metrics["profile"], "latency": None}
    _check(row["summary"], f"latency file, row {row['name']!r}, summary")
    ratio = None if of_float is None else row["ms"] / of_float["ms"]
    timed = {name: value for name, value in row.items() if name != "summary"}
    return {
        "profile": {**run.metrics["profile"], **row["summary"]},
        "latency": {**timed, "ratio_to_float": ratio},
    }


def _check(costs: Document, where: str) -> None:
    validated(_KIND, costs, where)


def _row(run: Run, latency: Document | None) -> Document | None:
    """The row of the very file that was scored."""
    rows = [] if latency is None else latency["rows"]
    return next((row for row in rows if row["sha256"] == run.scored_sha256), None)


def cost_tables(report: Document) -> list[Table]:
    """The tables of the section on layers, size and speed."""
    return [_coverage(report), _size(report), _latency(report)]


def cost_notes(report: Document) -> list[str]:
    """How to read the times, and what was measured but not compared, or the other way round."""
    if not report["latency"]:
        return []
    measured = [run["latency"] for run in report["runs"]]
    known = {row["sha256"] for row in measured if row}
    missing = [run["title"] for run, row in zip(report["runs"], measured, strict=True) if not row]
    left = [
        f"{row['name']} ({row['file']})" for row in report["latency"]["rows"] if row["sha256"] not in known
    ]
    return [
        *([_WHAT_TIMES_ARE, _conditions(report["latency"])] if known else []),
        *([f"Without a measured latency: {', '.join(missing)}."] if missing else []),
        *([f"Measured, but of no run that is compared: {', '.join(left)}."] if left else []),
    ]


def _conditions(latency: Document) -> str:
    return (
        f"Latency: medians of {latency['num_passes']} passes from voxels to boxes, {latency['num_voxels']:,} "
        f"voxels of the cloud {latency['input']}, on {latency['device']}, threads: {latency['num_threads']}, "
        f"torch {latency['torch']}."
    )


def _coverage(report: Document) -> Table:
    kinds = _keys(run["coverage"] for run in report["runs"])
    rows = [
        [run["title"], *("/".join(map(str, run["coverage"].get(kind, [NONE]))) for kind in kinds)]
        for run in report["runs"]
    ]
    return Table("Layers quantized, of all", ["arm", *kinds], rows)


def _size(report: Document) -> Table:
    measured = {key for run in report["runs"] for key in run["profile"]}
    keys = [key for key in _COSTS if key in measured]
    rows = [
        [run["title"], *(_measured(key, run["profile"].get(key)) for key in keys)] for run in report["runs"]
    ]
    header = [key.replace("_bytes", "_MiB").replace("_", " ") for key in keys]
    return Table("Size and memory", ["arm", *header], rows)


def _measured(key: str, value: float | None) -> str:
    if value is not None and key.endswith("_bytes"):
        return f"{value / 2**20:.2f}"
    return f"{value:,}" if isinstance(value, int) else number(value, ".4g")


def _latency(report: Document) -> Table:
    rows = [
        [
            run["title"],
            row["runs_as"],
            number(row["ms"], ".2f"),
            f"{row['min_ms']:.2f}-{row['max_ms']:.2f}",
            number(row["cpu_ms"], ".2f"),
            number(row["ratio_to_float"], ".2f"),
        ]
        for run in report["runs"]
        if (row := run["latency"])
    ]
    header = ["arm", "runs as", "median ms", "least-greatest ms", "CPU ms", "ratio to float"]
    return Table("Latency of one pass, measured in turn in one process", header, rows)


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
