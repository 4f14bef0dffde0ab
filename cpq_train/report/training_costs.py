"""What training cost by layer: `layer_latency.csv`, `layer_memory.csv` and `throughput.csv` of a run.

One row for each layer and measured step, and one for the steps that a throughput is a mean of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from os.path import lexists
from pathlib import Path
from statistics import median
from typing import TypeVar

from cpq_train.evaluation.metrics_file import Document
from cpq_train.report.csv_table import bounded, read_table
from cpq_train.report.tables import Table, code, number

LAYER_LATENCY_FILE, LAYER_MEMORY_FILE = "layer_latency.csv", "layer_memory.csv"
THROUGHPUT_FILE, THROUGHPUT_COLUMNS = "throughput.csv", ("step", "samples_per_s", "data_wait_share")
WHOLE = "step"
"""The row of the whole step among those of its layers."""

NUM_LISTED = 5
WHAT_TRAINING_COSTS = (
    "Medians over the measured steps; of the layers the slowest and the largest. Times of different runs "
    "can be compared only where the same machine, with nothing else to do, made them; `profile` times "
    "networks in turn. With fake quantization they are what training costs, not what a vehicle pays. Memory "
    "of a layer is what it keeps for backward and its peak while it runs; that of a whole training step is "
    "its peak until the backward pass."
)

_STAGES = {"train": "train", "validation": "validation", "validate": "validation"}
"""Stage of a row -> stage of the report: what a fit and what `validate` measured stand together."""

_COLUMNS = ("train_ms", "validation_ms", "train_bytes", "validation_bytes")
_HEADER = ("ms, training", "ms, validation", "MiB, training", "MiB, validation")

_Row = TypeVar("_Row")
_Measured = tuple[str, str, str, float]
"""Layer, kind, one of `_COLUMNS`, value."""


def memory_bytes(layer: str, saved_bytes: int, peak_bytes: int) -> int:
    """Memory as one number: kept for backward and peak; the peak of the whole step has both already."""
    return peak_bytes if layer == WHOLE else saved_bytes + peak_bytes


def describe_training_cost(folder: Path) -> Document | None:
    """What `report.json` says of what a run's training, and its passes in validation, cost.

    Returns:
        "step", the whole; "layers", the slowest and the largest; "throughput". Of each the medians, null
        where nothing was measured. None where the run directory has none of the files.

    Raises:
        UserError: A file is damaged.
    """
    memory_columns = ("stage", "layer", "kind", "saved_bytes", "peak_bytes")
    layers = _medians(
        [
            *_read(folder / LAYER_LATENCY_FILE, ("stage", "layer", "kind", "ms"), _time),
            *_read(folder / LAYER_MEMORY_FILE, memory_columns, _memory),
        ]
    )
    speeds = _read(folder / THROUGHPUT_FILE, THROUGHPUT_COLUMNS, _speed)
    if not layers and not speeds:
        return None
    whole = layers.pop(WHOLE, None)
    throughput = {name: median(speed[name] for speed in speeds) for name in speeds[0]} if speeds else None
    return {"step": whole, "layers": _listed(layers.values()), "throughput": throughput}


def _read(path: Path, columns: Sequence[str], parse: Callable[[dict[str, str]], _Row]) -> list[_Row]:
    return read_table(path, columns, parse) if lexists(path) else []


def _time(row: dict[str, str]) -> _Measured:
    return row["layer"], row["kind"], f"{_stage(row)}_ms", bounded(row, "ms")


def _memory(row: dict[str, str]) -> _Measured:
    size = memory_bytes(row["layer"], *(int(bounded(row, name)) for name in ("saved_bytes", "peak_bytes")))
    return row["layer"], row["kind"], f"{_stage(row)}_bytes", size


def _stage(row: dict[str, str]) -> str:
    if row["stage"] not in _STAGES:
        raise ValueError(f"stage is {row['stage']!r}; accepted: {', '.join(_STAGES)}")
    return _STAGES[row["stage"]]


def _speed(row: dict[str, str]) -> dict[str, float]:
    return {name: bounded(row, name) for name in THROUGHPUT_COLUMNS[1:]}


def _medians(measured: Iterable[_Measured]) -> dict[str, Document]:
    """Layer -> its name, kind and medians."""
    values: dict[str, dict[str, list[float]]] = {}
    kinds = {}
    for layer, kind, column, value in measured:
        values.setdefault(layer, {}).setdefault(column, []).append(value)
        kinds[layer] = kind
    return {
        layer: {
            "layer": layer,
            "kind": kinds[layer],
            **{column: median(found[column]) if column in found else None for column in _COLUMNS},
        }
        for layer, found in values.items()
    }


def _listed(layers: Collection[Document]) -> list[Document]:
    """The slowest and the largest layers, the slowest first."""
    by_time = sorted(layers, key=lambda layer: -_most(layer, "ms"))
    by_size = sorted(layers, key=lambda layer: -_most(layer, "bytes"))
    chosen = [layer["layer"] for layer in (*by_time[:NUM_LISTED], *by_size[:NUM_LISTED])]
    return [layer for layer in by_time if layer["layer"] in chosen]


def _most(layer: Document, unit: str) -> float:
    return max(layer[f"train_{unit}"] or 0.0, layer[f"validation_{unit}"] or 0.0)


def training_cost_tables(report: Document) -> list[Table]:
    """The tables of the section on what training cost: whole steps of all runs, and layers of each."""
    known = [(run["title"], run["training_cost"]) for run in report["runs"] if run["training_cost"]]
    whole = [
        [
            title,
            number((cost["throughput"] or {}).get("samples_per_s"), ".2f"),
            number((cost["throughput"] or {}).get("data_wait_share"), ".1%"),
            *_cells(cost["step"] or dict.fromkeys(_COLUMNS)),
        ]
        for title, cost in known
    ]
    header = ["arm", "samples per s, training", "waiting for data", *_HEADER]
    return [
        Table("Whole steps", header, whole),
        *(
            Table(
                f"{title}: slowest and largest layers",
                ["layer", "kind", *_HEADER],
                [[code(layer["layer"]), layer["kind"], *_cells(layer)] for layer in cost["layers"]],
            )
            for title, cost in known
        ),
    ]


def _cells(medians: Document) -> list[str]:
    times, sizes = [medians[name] for name in _COLUMNS[:2]], [medians[name] for name in _COLUMNS[2:]]
    return [
        *(number(ms, ".1f") for ms in times),
        *(number(None if size is None else size / 2**20, ".1f") for size in sizes),
    ]
