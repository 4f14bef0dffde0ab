"""What quantization-aware training costs: a QAT step over a float step, beside pytorch-quantization's layers.

    python scripts/bench/qat_overhead.py

A step is forward and backward with fixed gradients at the outputs, ranges frozen; loss, optimizer and data
are the same for all and left out. All arms have BatchNorm folded and the dense layers in channels_last
memory. They run in turn within each round, each round starting with the next one and every other round in
reverse; a ratio is taken within a round, and the median over the rounds is reported. Freed memory is kept in
the process, for all arms: otherwise the order of the arms decides which of them hands it back and fetches it
again page by page. With one thread the clock is the process's CPU time, so that other work on the machine
does not count; with more it is wall time; on CUDA it is CUDA events.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from arms_to_compare import build_arms, run
from jsonargparse import auto_cli
from lidar_like import load_batch, synthetic_batch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.common.progress import progress
from cpq_train.data.dataset import Batch
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.scheme import Scheme

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORKS = {"full": "centerpoint_voxel01.yaml", "quickstart": "quickstart_float.yaml"}
BATCH_SIZES = {"full": 1, "quickstart": 4}
PARTS = ("dense", "sparse", "whole")
LIMITS = {"dense": 1.12, "sparse": 1.06}
"""Largest accepted ratio of a QAT step to a float step."""

Outputs = list[Tensor]
Step = Callable[[], float]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        network: A key of `NETWORKS`.
        part: dense (BEV backbone and head), sparse (3-D backbone, rulebooks included) or whole.
        num_voxels: Active input voxels.
        milliseconds: Median time of a step by arm.
        ratios: Median ratio to the float step of the same round, by arm.
        spread: Smallest and largest of these ratios, by arm.
    """

    network: str
    part: str
    num_voxels: int
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    spread: dict[str, tuple[float, float]]

    @property
    def holds(self) -> bool:
        """Whether QAT is within its limit and cheaper than pytorch-quantization."""
        return (
            self.ratios["qat"] <= LIMITS.get(self.part, math.inf) and self.ratios["qat"] < self.ratios["pq"]
        )


def main(
    networks: tuple[str, ...] = tuple(NETWORKS),
    parts: tuple[str, ...] = PARTS,
    num_rounds: int = 12,
    threads: int = 1,
    device: str = "auto",
    scheme: Path = CONFIGS / "schemes" / "int8.yaml",
    root: Path | None = None,
    version: str = "v1.0-trainval",
    output: Path | None = None,
) -> None:
    """Measure the QAT step against the float step; exit code 1 if a limit is passed.

    Args:
        networks: full (0.1 m, one sample of ten sweeps) and quickstart (batch and sweeps of its
            configuration), either or both.
        parts: dense, sparse, whole.
        num_rounds: Rounds that count; one more warms up. A multiple of six puts every arm everywhere.
        threads: 1 measures CPU time, more measure wall time. Ignored on CUDA.
        device: cpu, cuda, or auto for CUDA where there is one.
        scheme: What to quantize.
        root: nuScenes or simulated data to take samples from; without it they are made up.
        version: Version of the data under `root`.
        output: JSON file for the result.
    """
    _check("networks", networks, tuple(NETWORKS))
    _check("parts", parts, PARTS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _keep_freed_memory()
    torch.set_num_threads(threads)
    clock = "CUDA events" if device == "cuda" else "CPU time" if threads == 1 else "wall time"
    rows: list[Row] = []
    with progress("measuring", len(networks) * len(parts) * (num_rounds + 1)) as advance:
        for name in networks:
            config, batch = _workload(name, root, version)
            batch = _to(batch, device)
            arms = {
                arm: network.to(device)
                for arm, network in build_arms(config, _max_ranges(scheme), batch).items()
            }
            for part in parts:
                steps = _steps(arms, part, batch, _timer(clock))
                times = _interleaved(steps, num_rounds, lambda: advance(1))
                rows.append(_row(name, part, len(batch["voxel_coords"]), times))
    context = {"clock": clock, "threads": threads, "num_rounds": num_rounds, **_machine(device)}
    _show(rows, context)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        result = {"context": context, "rows": [{**asdict(row), "holds": row.holds} for row in rows]}
        output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if all(row.holds for row in rows) else 1)


def _keep_freed_memory() -> None:
    """Tell glibc never to return memory to the system; nothing happens with another C library."""
    m_trim_threshold, m_mmap_threshold, one_gib = -1, -3, 2**30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_trim_threshold, one_gib)
        mallopt(m_mmap_threshold, one_gib)


def _check(option: str, values: tuple[str, ...], accepted: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in accepted]
    if unknown:
        raise UserError(f"{option}: got {unknown[0]!r}, accepted: {', '.join(accepted)}")


def _workload(name: str, root: Path | None, version: str) -> tuple[NetworkConfig, Batch]:
    content = yaml.safe_load((CONFIGS / NETWORKS[name]).read_text())
    config = NetworkConfig(**content["model"]["network"])
    num_sweeps, size = content["data"]["num_sweeps"], BATCH_SIZES[name]
    if root is not None:
        return config, load_batch(config, root, version, num_sweeps, size)
    return config, synthetic_batch(config, num_sweeps, size)


def _max_ranges(path: Path) -> Scheme:
    """The scheme with max calibration, the quickest; how a range was found costs a step nothing."""
    scheme = Scheme.from_file(path)
    inputs = replace(scheme.defaults.input, method="max")
    return replace(scheme, defaults=replace(scheme.defaults, input=inputs))


def _to(batch: Batch, device: str) -> Batch:
    moved: Any = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    result: Batch = moved
    return result


def _steps(
    arms: dict[str, CenterPoint], part: str, batch: Batch, timer: Callable[..., Any]
) -> dict[str, Step]:
    """A timed training step for every arm, all on the same input and output gradients."""
    with torch.no_grad():
        network = arms["float"]
        volume = network.backbone_3d(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])
        bev = network.map_to_bev_module(volume)
    forwards = {arm: _forward(network, part, batch, bev) for arm, network in arms.items()}
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        gradients = [
            torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator))
            for out in forwards["float"]()
        ]

    def step(arm: str) -> float:
        with timer() as elapsed:
            torch.autograd.backward(forwards[arm](), gradients)
        arms[arm].zero_grad()
        return float(elapsed())

    return {arm: lambda arm=arm: step(arm) for arm in arms}  # type: ignore[misc]


def _forward(network: CenterPoint, part: str, batch: Batch, bev: Tensor) -> Callable[[], Outputs]:
    def sparse() -> Outputs:
        volume = network.backbone_3d(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])
        return [volume.features]

    def dense() -> Outputs:
        # A fresh leaf, because the BEV map needs a gradient in training too.
        return _flat(network.dense_head(network.backbone_2d(bev.detach().requires_grad_())))

    return {"sparse": sparse, "dense": dense, "whole": lambda: _flat(run(network, batch))}[part]


def _flat(heads: list[dict[str, Tensor]]) -> Outputs:
    return [out for head in heads for out in head.values()]


def _timer(clock: str) -> Callable[..., Any]:
    return _cuda_timer if clock == "CUDA events" else _host_timer(clock)


def _host_timer(clock: str) -> Callable[..., Any]:
    now = time.process_time if clock == "CPU time" else time.perf_counter

    @contextmanager
    def timer() -> Iterator[Callable[[], float]]:
        times = [now()]
        yield lambda: 1e3 * (times[1] - times[0])
        times.append(now())

    return timer


@contextmanager
def _cuda_timer() -> Iterator[Callable[[], float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    yield lambda: start.elapsed_time(end)
    end.record()
    torch.cuda.synchronize()


def _interleaved(
    steps: dict[str, Step], num_rounds: int, advance: Callable[[], None]
) -> dict[str, list[float]]:
    """Milliseconds of each arm in each round; the first round is dropped."""
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(num_rounds + 1):
        first = number % len(steps)
        order = [*steps][first:] + [*steps][:first]
        for arm in order[:: 1 if number % 2 else -1]:
            times[arm].append(steps[arm]())
        advance()
    return {arm: values[1:] for arm, values in times.items()}


def _row(network: str, part: str, num_voxels: int, times: dict[str, list[float]]) -> Row:
    ratios = {
        arm: [a / b for a, b in zip(values, times["float"], strict=True)] for arm, values in times.items()
    }
    return Row(
        network,
        part,
        num_voxels,
        {arm: median(values) for arm, values in times.items()},
        {arm: median(values) for arm, values in ratios.items()},
        {arm: (min(values), max(values)) for arm, values in ratios.items()},
    )


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    isa = torch.backends.cpu.get_cpu_capability() if device == "cpu" else ""
    return {"device": " ".join((name, isa)).strip(), "torch": torch.__version__}


def _show(rows: list[Row], context: dict[str, Any]) -> None:
    table = Table(title="Training step, ratio to float (median, smallest to largest)", caption=str(context))
    for column in ("network", "part", "voxels"):
        table.add_column(column)
    for column in ("float ms", "QAT", "pytorch-quantization", "limit", "holds"):
        table.add_column(column, justify="right")
    for row in rows:
        qat, pq = (
            f"{row.ratios[arm]:.3f} ({row.spread[arm][0]:.3f} to {row.spread[arm][1]:.3f})"
            for arm in ("qat", "pq")
        )
        limit = LIMITS.get(row.part)
        table.add_row(
            row.network,
            row.part,
            f"{row.num_voxels:,}",
            f"{row.milliseconds['float']:.0f}",
            qat,
            pq,
            "" if limit is None else f"{limit:.2f}",
            "yes" if row.holds else "no",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
