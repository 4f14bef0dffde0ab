"""What LayerLatency and LayerMemory add to training: a measured step over a plain one, by their interval.

    python scripts/bench/callback_overhead.py

A step is forward and backward of the network with fixed gradients at the outputs; loss, optimizer and data
would make it longer and the share smaller. Plain and measured steps take turns; a ratio is taken within a
round, and the median over the rounds is reported. On one CPU thread the clock is the process's CPU time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from cpq_train.callbacks.layer_latency import STEP_FUNCTIONS, LayerLatency
from cpq_train.callbacks.layer_memory import LayerMemory
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.profile import NETWORK_FUNCTIONS
from cpq_train.profiling.instrument import observing
from cpq_train.profiling.latency import Stopwatch
from cpq_train.profiling.memory import observing_memory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Context = Callable[[], AbstractContextManager[Any]]

LIMIT = 0.01
"""Largest accepted mean overhead of a callback."""


def main(config: Path = CONFIGS / "quickstart_float.yaml", num_rounds: int = 8, device: str = "cpu") -> None:
    """Measure; exit code 1 if a callback adds more than its limit.

    Args:
        config: Configuration of a network; samples are made up.
        num_rounds: Rounds that count; one more warms up.
        device: cpu or cuda.
    """
    torch.set_num_threads(1)
    content = yaml.safe_load(config.read_text())
    batch = synthetic_batch(NetworkConfig(**content["model"]["network"]), content["data"]["num_sweeps"], 1)
    on = torch.device(device)
    network = CenterPoint(NetworkConfig(**content["model"]["network"])).to(on)
    inputs = (batch["voxel_features"].to(on), batch["voxel_coords"].to(on), 1)
    ways: dict[str, Context] = {
        "plain": nullcontext,
        "LayerLatency": lambda: observing(network, Stopwatch(on), STEP_FUNCTIONS),
        "LayerMemory": lambda: observing_memory(network, on, NETWORK_FUNCTIONS),
    }
    rounds = [
        {name: _step(network, inputs, context) for name, context in ways.items()}
        for _ in track(range(num_rounds + 1), "Measuring", transient=True)
    ][1:]
    extra = {name: median(r[name] / r["plain"] - 1 for r in rounds) for name in list(ways)[1:]}
    intervals = {type(c).__name__: c.every_n_steps for c in (LayerLatency(), LayerMemory())}
    table = Table(title=f"{config.name}, plain step {1e3 * median(r['plain'] for r in rounds):.0f} ms")
    for header in ("callback", "a measured step", "every n steps", "mean overhead"):
        table.add_column(header, justify="right")
    for name, share in extra.items():
        mean = share / intervals[name]
        table.add_row(name, f"{share:+.1%}", str(intervals[name]), f"{mean:.4%}")
    Console().print(table)
    sys.exit(any(share / intervals[name] > LIMIT for name, share in extra.items()))


def _step(network: CenterPoint, inputs: tuple[Tensor, Tensor, int], context: Context) -> float:
    """Seconds of one step; the forward pass is observed, as the callbacks do it."""
    now = time.perf_counter if inputs[0].is_cuda else time.process_time
    start = now()
    with context():
        outputs = [out for head in network(*inputs) for out in head.values()]
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    elapsed = now() - start
    network.zero_grad()
    return elapsed


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
