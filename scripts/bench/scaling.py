"""How a training step grows: with the voxels of a sample, with the batch, and over ranks.

    python scripts/bench/scaling.py

Voxels are those of one sample in the full network, samples those of the quickstart network. `steps.py` says
what a step is. Ranks are processes of one thread and one sample each, which add up their gradients (DDP,
gloo): wall time until the slowest is through. They are measured on the CPU only.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from arms_to_compare import run
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from machine import settle
from results import Row, spread, write_rows
from steps import ARMS, FLOAT, QAT, Measured, Workload, config_of, ratios, time_part
from torch import distributed, nn
from torch.multiprocessing import get_context

from cpq_train.profiling.latency import clock_of

WAYS = (FLOAT, QAT)


def main(
    voxels: tuple[int, ...] = (10_000, 30_000, 60_000, 120_000),
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8),
    ranks: tuple[int, ...] = (1, 2),
    num_rounds: int = 3,
    device: str = "cpu",
) -> None:
    """Measure, and put a table into the results of this machine.

    Args:
        voxels: Of a sample, at the most 131,851.
        batch_sizes: Samples of a step.
        ranks: Processes, each with one sample.
        num_rounds: That count; one more warms up.
        device: cpu or cuda; of the first two.
    """
    settle()
    rows: list[Row] = []
    for number in voxels:
        rows.append(_grown("full", "voxels", number, device, num_rounds, 1, number))
    for number in batch_sizes:
        rows.append(_grown("quickstart", "samples", number, device, num_rounds, number))
    for number in ranks:
        rows.append(_row("quickstart", "ranks", number, _over_ranks(number, num_rounds)))
    clock = clock_of(torch.device(device)).name
    write_rows("scaling", rows, device, clock=f"{clock}, over ranks wall time", rounds=num_rounds)


def _grown(
    name: str, grows: str, number: int, device: str, num_rounds: int, batch_size: int, *limit: int
) -> Row:
    config, num_sweeps = config_of(name)
    batch = synthetic_batch(config, num_sweeps, batch_size, *limit)
    work = Workload.of(config, batch, device)
    return _row(name, grows, number, time_part(work, "whole", num_rounds, WAYS))


def _row(network: str, grows: str, number: int, times: Measured) -> Row:
    named = {f"{arm}, ms": spread(times[arm]) for arm in WAYS}
    ratio = spread(ratios(times, QAT, FLOAT))
    return {"network": network, "grows": grows, "number": number, **named, "ratio": ratio}


def _over_ranks(num_ranks: int, num_rounds: int) -> Measured:
    """Milliseconds until the slowest rank has made its step."""
    context = get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(rank, num_ranks, port, num_rounds, results) for rank in range(num_ranks)]
    processes = [context.Process(target=_rank, args=place) for place in places]
    for process in processes:
        process.start()
    found: Sequence[Measured] = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {arm: [max(times) for times in zip(*(one[arm] for one in found), strict=True)] for arm in WAYS}


def _rank(rank: int, num_ranks: int, port: int, num_rounds: int, results: Any) -> None:
    settle()
    warnings.simplefilter("ignore", FutureWarning)  # what DDP says of broadcast_buffers
    store = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=num_ranks)
    config, num_sweeps = config_of("quickstart")
    work = Workload.of(config, synthetic_batch(config, num_sweeps, 1, first_seed=rank), "cpu")
    wrapped = {
        arm: nn.parallel.DistributedDataParallel(
            work.networks[ARMS[arm].network], broadcast_buffers=False, gradient_as_bucket_view=True
        )
        for arm in WAYS
    }
    times: Measured = {arm: [] for arm in WAYS}
    for number in range(num_rounds + 1):
        for arm in WAYS[:: 1 if number % 2 else -1]:
            distributed.barrier()
            start_s = time.perf_counter()
            with ARMS[arm].kernels():
                outputs = [out for head in run(wrapped[arm], work.batch) for out in head.values()]
                torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
            times[arm].append(1e3 * (time.perf_counter() - start_s))
            wrapped[arm].zero_grad()
    results.put({arm: values[1:] for arm, values in times.items()})
    distributed.destroy_process_group()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
