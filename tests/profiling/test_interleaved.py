"""Runs that take turns, on a clock that only they move; and the file of their times."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpq_train.common.errors import UserError
from cpq_train.profiling import interleaved
from cpq_train.profiling.interleaved import time_in_turn
from cpq_train.profiling.latency_file import engine_label, read_latency, write_latency

CPU = torch.device("cpu")


class FakeTime:
    """Seconds on the clock and of the processors, moved by whoever runs; nothing else takes any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(interleaved.time, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(interleaved.time, "process_time", lambda: self.cpu_s)

    def run(self, name: str, walls_s: list[float], cpu_s: float) -> Callable[[], None]:
        remaining = iter(walls_s)

        def run() -> None:
            self.calls.append(name)
            self.wall_s += next(remaining)
            self.cpu_s += cpu_s

        return run


def test_runs_take_turns_in_an_order_that_turns_around(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime(monkeypatch)
    runs = {name: fake.run(name, [1.0] * 5, 0.5) for name in "ABC"}
    time_in_turn(runs, CPU, num_rounds=3, num_warm_up=2)
    assert "".join(fake.calls) == "AABBCC" + "ABC" + "CBA" + "ABC"


def test_times_are_of_the_run_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of each is the warm-up, the slowest of all, and not counted."""
    fake = FakeTime(monkeypatch)
    runs = {
        "fast": fake.run("fast", [100.0, 2.0, 1.0, 6.0], 4.0),
        "slow": fake.run("slow", [100.0, 20.0, 30.0, 25.0], 0.5),
    }
    found = time_in_turn(runs, CPU, num_rounds=3, num_warm_up=1)
    assert list(found) == ["fast", "slow"]
    fast, slow = found["fast"], found["slow"]
    assert (fast.wall.ms, fast.wall.min_ms, fast.wall.max_ms) == (2000, 1000, 6000)
    assert (slow.wall.ms, slow.wall.min_ms, slow.wall.max_ms) == (25_000, 20_000, 30_000)
    assert (fast.cpu_ms, slow.cpu_ms) == (4000, 500)


ROW = {
    "name": "float",
    "arm": "float",
    "file": "a.ckpt",
    "sha256": "a" * 64,
    "runs_as": "PyTorch, float",
    **{"ms": 2.0, "min_ms": 1.5, "max_ms": 3, "cpu_ms": 2.5},
    "summary": {"num_macs": 1},
}
DOCUMENT = {
    "input": "synthetic",
    **{"num_points": 9, "num_voxels": 5, "num_threads": 1, "num_passes": 5},
    **{"device": "cpu", "torch": "2.13.0"},
    "rows": [ROW, {**ROW, "name": "deployed", "arm": "deployed", "runs_as": engine_label("ort", "1.2")}],
}


def test_the_file_is_read_as_written(tmp_path: Path) -> None:
    write_latency(tmp_path / "latency.json", DOCUMENT)
    read = read_latency(tmp_path / "latency.json")
    assert read == {"schema": 1, **DOCUMENT}
    assert read["rows"][1]["runs_as"] == "engine, ort 1.2"


def _without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**DOCUMENT, "schema": 2}, "schema is 2; accepted: 1: a newer cpq_train wrote it"),
        ({**DOCUMENT, "schema": None}, "schema is None; accepted: 1$"),
        ({**DOCUMENT, "num_voxels": 0}, "num_voxels: got 0, accepted: a count above 0"),
        (_without(DOCUMENT, "device"), "json: needs 'device', and has schema"),
        ({**DOCUMENT, "rows": {}}, "rows: got {}, accepted: a list"),
        ({**DOCUMENT, "rows": [ROW, "ptq"]}, "row 2: got 'ptq', accepted: a mapping"),
        ({**DOCUMENT, "rows": [ROW, {**ROW, "ms": "fast"}]}, "row 2, ms: got 'fast', accepted: a finite"),
        ({**DOCUMENT, "rows": [{**ROW, "arm": "int8"}]}, "row 1, arm: got 'int8', accepted: float, .*dep"),
        ([], r"json: got \[\], accepted: a mapping"),
    ],
)
def test_what_is_no_such_file_is_refused(document: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"schema": 1, **document} if isinstance(document, dict) else document))
    with pytest.raises(UserError, match=message) as error:
        read_latency(path)
    assert str(path) in str(error.value)


def test_no_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    for content in (None, "{"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=r"latency\.json' (does not exist|is no JSON)"):
            read_latency(path)


def test_what_is_no_document_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1, cpu_ms: got nan"):
        write_latency(tmp_path / "latency.json", {**DOCUMENT, "rows": [{**ROW, "cpu_ms": float("nan")}]})
    assert not list(tmp_path.iterdir())


def test_the_file_is_read_without_torch() -> None:
    code = "import sys, cpq_train.profiling.latency_file; print({'torch', 'lightning'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"
