"""What checking a checkpoint costs beside loading it.

    python scripts/bench/reading.py

Writes a checkpoint of the full network (0.1 m) with the two moments of its optimizer, about 107 MB, and in
turn loads it as torch does, as this project does, and only passes over its bytes with a checksum. Prints
medians of CPU time of one thread, and their ratios to torch's.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from machine import settle
from results import write_rows

from cpq_train.arms.structure import build
from cpq_train.common.checkpoint import NETWORK_PREFIX, read_plain, write_checkpoint
from cpq_train.models import NetworkConfig


def main(num_rounds: int = 15) -> None:
    """Measures and prints.

    Args:
        num_rounds: Of all ways in turn.
    """
    settle()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "full.ckpt"
        write_checkpoint(_content(), file)
        ways: dict[str, Callable[[], object]] = {
            "torch.load": lambda: torch.load(file, weights_only=True),
            "read_plain": lambda: read_plain(file),
            "read_plain, what it says": lambda: read_plain(file, mmap=True),
            "a pass with a checksum": lambda: zlib.crc32(file.read_bytes()),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_rounds):
            for name, way in ways.items():
                began_s = time.process_time()
                way()
                times[name].append(time.process_time() - began_s)
        size = file.stat().st_size
    medians = {name: median(each) for name, each in times.items()}
    rows = {
        name: {"cpu_ms": round(1e3 * seconds, 1), "ratio": round(seconds / medians["torch.load"], 2)}
        for name, seconds in medians.items()
    }
    write_rows(
        "reading", [{"way": name, **row} for name, row in rows.items()], num_bytes=size, rounds=num_rounds
    )


def _content() -> dict[str, object]:
    """Weights, and moments in the shapes of all of them."""
    subject = build(NetworkConfig(), "float", None)
    state = {NETWORK_PREFIX + name: tensor for name, tensor in subject.network.state_dict().items()}
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for number, p in enumerate(subject.network.parameters())
    }
    return {"state_dict": state, "optimizer_states": [{"state": moments}], "quantization": subject.describe()}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
