"""An independent reader of the file that W&B writes offline: a 7-byte header, then LevelDB's log blocks."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    offset, parts = 7, []
    while offset + HEADER <= len(data):
        left = BLOCK - offset % BLOCK
        if left < HEADER:
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        offset += HEADER
        parts.append(data[offset : offset + length])
        offset += length
        if kind in (1, 4):  # full, or the last part
            yield b"".join(parts)
            parts = []


@dataclass
class OfflineRun:
    """What one file of W&B says."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    num_config_updates: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def read_artifacts(self) -> list[str]:
        return [artifact.name for artifact in self.artifacts if artifact.use_after_commit]

    def written(self) -> dict[str, set[str]]:
        """Name -> aliases."""
        return {a.name: set(a.aliases) for a in self.artifacts if not a.use_after_commit}

    def at_step(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each logged value."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]


def read(file: Path) -> OfflineRun:
    found = OfflineRun()
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found, record.run.config)
        elif kind == "config":
            _update(found, record.config)
        elif kind == "summary":
            for item in record.summary.update:
                found.summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "history":
            found.history.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _update(found: OfflineRun, config: Any) -> None:
    for item in config.update:
        key = item.key or ".".join(item.nested_key)
        if found.config.get(key) != json.loads(item.value_json):
            found.num_config_updates[key] = found.num_config_updates.get(key, 0) + 1
        found.config[key] = json.loads(item.value_json)


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """Of a run directory, oldest first; W&B writes in a process of its own, which is ended here."""
    wandb.teardown()
    return [read(file) for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))]
