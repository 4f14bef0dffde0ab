"""Profiles as tables on the console, as JSON and as CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.table import Table

from cpq_train.common.console import print_plain
from cpq_train.common.files import write_whole
from cpq_train.common.text import in_row
from cpq_train.profiling.latency import Latency, LatencyRow, Spread
from cpq_train.profiling.memory import MemoryRow
from cpq_train.profiling.storage import StorageRow

SCHEMA = 1
PROFILE_FILE = "profile.json"
NUM_SHOWN = 20
"""Layers in a table on the console; the files have all."""

BYTES_PER_MIB = 2**20


@dataclass(frozen=True)
class Profile:
    """All that was measured of a network.

    Attributes:
        context: What was measured on what: plain values.
        tree: The module tree in PyTorch's form.
        latency: Of an evaluation pass.
        memory: Of the forward pass of training, by layer.
        training_peak_bytes: Most that was allocated in that pass, above what was allocated before.
        evaluation_peak_bytes: The same of an evaluation pass.
        storage: The tree of parameters, the whole first.
    """

    context: Mapping[str, Any]
    tree: str
    latency: Latency
    memory: Sequence[MemoryRow]
    training_peak_bytes: int
    evaluation_peak_bytes: int
    storage: Sequence[StorageRow]

    @property
    def saved_bytes(self) -> int:
        """What the forward pass of training keeps for backward."""
        return sum(row.saved_bytes for row in self.memory)

    def summary(self) -> dict[str, Any]:
        """The whole in a few numbers: the `profile` entry of `metrics.json`."""
        return {
            **self.context,
            "latency_ms": self.latency.plain.ms,
            "latency_range_ms": [self.latency.plain.min_ms, self.latency.plain.max_ms],
            **self.costs(),
        }

    def costs(self) -> dict[str, Any]:
        """Work, memory and size: what is the same whenever and beside whatever it is measured."""
        return {
            "num_macs": sum(row.macs for row in self.latency.layers),
            "evaluation_peak_bytes": self.evaluation_peak_bytes,
            "training_peak_bytes": self.training_peak_bytes,
            "saved_bytes": self.saved_bytes,
            **size_summary(self.storage),
        }

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        latency = self.latency
        return {
            "schema": SCHEMA,
            "summary": self.summary(),
            "latency": {
                "whole": asdict(latency.whole),
                "plain": asdict(latency.plain),
                "unattributed": {**asdict(latency.unattributed), "share": latency.unattributed_share},
                "layers": [_latency_record(row) for row in latency.layers],
                "kinds": [_latency_record(row) for row in latency.kinds],
            },
            "memory": [asdict(row) for row in self.memory],
            "storage": [asdict(row) for row in self.storage],
        }


def size_summary(storage: Sequence[StorageRow]) -> dict[str, Any]:
    """What a network stores in all, from its tree of parameters; needs no pass."""
    whole = storage[0]
    return {
        "num_parameters": whole.num_elements,
        "float_bytes": whole.float_bytes,
        "stored_bytes": whole.stored_bytes,
    }


def write_files(folder: Path, profile: Profile) -> None:
    """Write `profile.json`, `latency.csv`, `memory.csv`, `storage.csv` and `modules.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = profile.document()
    write_whole(folder / PROFILE_FILE, json.dumps(document, indent=2) + "\n")
    write_whole(folder / "modules.txt", profile.tree + "\n")
    write_csv(folder / "latency.csv", document["latency"]["layers"])
    write_csv(folder / "memory.csv", document["memory"])
    write_csv(folder / "storage.csv", document["storage"])


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Records with equal keys as a table with a header."""
    text = StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]) if records else [])
    writer.writeheader()
    writer.writerows(map(in_row, records))
    write_whole(path, text.getvalue())


def print_profile(profile: Profile) -> None:
    """The module tree, then the tables."""
    print_plain(
        profile.tree,
        storage_table(profile.storage),
        memory_table(profile.memory),
        latency_table(profile.latency),
        kinds_table(profile.latency),
        summary_line(profile),
    )


def print_in_turn(rows: Sequence[Mapping[str, Any]]) -> None:
    """What a pass of each network takes: rows of `latency.json`."""
    table = _table(
        "Latency of one pass, measured in turn in one process",
        ("network", "runs as"),
        ("ms", "from - to", "CPU ms"),
    )
    for row in rows:
        time = Spread(row["ms"], row["min_ms"], row["max_ms"])
        table.add_row(row["name"], row["runs_as"], f"{time.ms:.2f}", _range(time), f"{row['cpu_ms']:.2f}")
    print_plain(table)


def latency_table(latency: Latency) -> Table:
    """The layers that take longest."""
    table = _table("Latency by layer", ("layer", "kind"), _TIME_COLUMNS)
    for row in latency.layers[:NUM_SHOWN]:
        table.add_row(row.name, row.kind, *_time_cells(row))
    if latency.layers[NUM_SHOWN:]:
        rest = latency.layers[NUM_SHOWN:]
        share = sum(row.share for row in rest)
        table.add_row(f"{len(rest)} more", "", f"{sum(row.time.ms for row in rest):.2f}", "", f"{share:.1%}")
    return _with_whole(table, latency)


def kinds_table(latency: Latency) -> Table:
    """The time of all layers of a kind."""
    table = _table("Latency by kind", ("kind", "layers"), _TIME_COLUMNS)
    for row in latency.kinds:
        table.add_row(row.kind, str(row.calls), *_time_cells(row))
    return _with_whole(table, latency)


def memory_table(rows: Sequence[MemoryRow]) -> Table:
    """The layers that need most memory in the forward pass of training."""
    columns = ("parameters", "buffers", "kept for backward", "outputs", "peak while running")
    table = _table("Memory by layer in training, MiB", ("layer", "kind"), columns)
    by_size = sorted(rows, key=lambda row: -(row.saved_bytes + row.peak_bytes))
    for row in by_size[:NUM_SHOWN]:
        table.add_row(row.name, row.kind, *(mib(n) for n in _memory_numbers(row)))
    rest = by_size[NUM_SHOWN:]
    if rest:
        *sums, peaks = zip(*(_memory_numbers(row) for row in rest), strict=True)
        table.add_row(f"{len(rest)} more", "", *(mib(sum(column)) for column in sums), mib(max(peaks)))
    *sums, _ = zip(*(_memory_numbers(row) for row in rows), strict=True)
    table.add_section()
    table.add_row("all layers", "", *(mib(sum(column)) for column in sums), "")
    return table


def storage_table(rows: Iterable[StorageRow]) -> Table:
    """The tree of parameters, in float and at the bits that they are stored with."""
    table = _table("Storage by module", ("name", "#elements or shape"), ("float, bytes", "stored, bytes"))
    for row in rows:
        table.add_row(*row.cells(), f"{row.float_bytes:,}", f"{row.stored_bytes:,.0f}")
    return table


def mib(num_bytes: float) -> str:
    """Bytes in MiB, three decimals."""
    return f"{num_bytes / BYTES_PER_MIB:,.3f}"


_TIME_COLUMNS = ("ms", "from - to", "share", "MACs", "GFLOP/s")


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right")
    return table


def _time_cells(row: LatencyRow) -> list[str]:
    work = [f"{row.macs:,.0f}", f"{row.gflop_per_s:.1f}"] if row.macs else ["", ""]
    return [f"{row.time.ms:.2f}", _range(row.time), f"{row.share:.1%}", *work]


def _range(time: Spread) -> str:
    return f"{time.min_ms:.2f} - {time.max_ms:.2f}"


def _with_whole(table: Table, latency: Latency) -> Table:
    table.add_section()
    rest, whole = latency.unattributed, latency.whole
    table.add_row("unattributed", "", f"{rest.ms:.2f}", _range(rest), f"{latency.unattributed_share:.1%}")
    table.add_row("whole, measured by layer", "", f"{whole.ms:.2f}", _range(whole), "100.0%")
    table.add_row("whole, without hooks", "", f"{latency.plain.ms:.2f}", _range(latency.plain), "")
    return table


def _memory_numbers(row: MemoryRow) -> tuple[int, ...]:
    state = (row.parameter_bytes, row.buffer_bytes)
    return *state, row.saved_bytes, row.output_bytes, row.peak_bytes


def _latency_record(row: LatencyRow) -> dict[str, Any]:
    head = {"name": row.name, "kind": row.kind, "parts": row.calls}
    return {**head, **asdict(row.time), "share": row.share, "macs": row.macs, "gflop_per_s": row.gflop_per_s}


def summary_line(profile: Profile) -> str:
    """What was measured on what, and the memory of the whole."""
    context = ", ".join(f"{key} {value}" for key, value in profile.context.items())
    return (
        f"{context}\nmost allocated at once: {mib(profile.evaluation_peak_bytes)} MiB in an evaluation pass, "
        f"{mib(profile.training_peak_bytes)} MiB in the forward pass of training, "
        f"{mib(profile.saved_bytes)} MiB of it kept for backward"
    )
