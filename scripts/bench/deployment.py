#!/usr/bin/env python
"""What a deployment file costs in onnxruntime, against the network in PyTorch that it was made of.

Networks alone, from voxels to heads, on one thread: medians of CPU time, all in turn in one process. With
`--convolutions` the two exact ways to convolve codes that ONNX has, at sizes of the 0.1 m network.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from rich.console import Console
from rich.table import Table

from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.data.dataset import Batch
from cpq_train.data.settings import DataSettings
from cpq_train.export.engine import Engine, new_session
from cpq_train.export.graph import Graph
from cpq_train.export.writing import write_deployment
from cpq_train.models import NetworkConfig
from cpq_train.models.decode import PostProcessing
from cpq_train.profiling.interleaved import time_in_turn
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    "quickstart": REPOSITORY / "configs/quickstart_float.yaml",
    "full": REPOSITORY / "configs/centerpoint_voxel01.yaml",
}
CONVOLUTIONS = ((128, 128, 128), (256, 256, 64), (512, 64, 128), (64, 64, 128))
"""Input channels, output channels, rows and columns of the map."""

NUMBERS = ("ms", "to float", "differ", "ratio")
"""Columns of the tables that hold numbers."""

CPU = torch.device("cpu")


def main(
    networks: tuple[str, ...] = tuple(CONFIGS),
    scheme: str = "int8",
    num_rounds: int = 9,
    convolutions: bool = False,
) -> None:
    """Measure.

    Args:
        networks: Of `CONFIGS`; random weights, ranges of the cloud at hand.
        scheme: A file of configs/schemes.
        num_rounds: Passes of each that count.
        convolutions: Compare Conv on whole numbers with ConvInteger too.
    """
    if unknown := set(networks) - set(CONFIGS):
        raise UserError(f"networks: got {sorted(unknown)[0]!r}, accepted: {', '.join(CONFIGS)}")
    torch.set_num_threads(1)
    chosen = Scheme.from_file(str(REPOSITORY / f"configs/schemes/{scheme}.yaml"))
    table = _table("Network alone, CPU time of one thread", "network", "runs as", "ms", "to float", "differ")
    for name in networks:
        _measure(name, chosen, num_rounds, table)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if convolutions:
        console.print(_convolutions(num_rounds))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    return table


def _measure(name: str, scheme: Scheme, num_rounds: int, table: Table) -> None:
    content = yaml.safe_load(CONFIGS[name].read_text())
    config = NetworkConfig(**content["model"].get("network", {}))
    batch = synthetic_batch(config, content["data"].get("num_sweeps", 10), 1)
    torch.manual_seed(0)
    plain, subject = build(config, "float", None).network.eval(), build(config, "ptq", scheme)
    network = subject.network.eval()
    with torch.no_grad(), collecting_ranges(network):
        network(*_inputs(batch))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, file = Path(folder) / "ptq.ckpt", Path(folder) / "ptq.onnx"
        torch.save(network.state_dict(), checkpoint)
        write_deployment("portable", subject, PostProcessing(), DataSettings(), checkpoint, file)
        engine = Engine(file)
    in_pytorch = f"PyTorch, {scheme.name}"
    passes = {"PyTorch, float": plain, in_pytorch: network, f"onnxruntime {engine.version}": engine}
    found = {run: _run(one, batch) for run, one in passes.items()}
    times = time_in_turn({run: _pass(one, batch) for run, one in passes.items()}, CPU, num_rounds, 1)
    of_float, ours = times["PyTorch, float"].cpu_ms, found[in_pytorch]
    for run, timing in times.items():
        differ = sum(int((a != b).sum()) for a, b in zip(_maps(found[run]), _maps(ours), strict=True))
        total = sum(one.numel() for one in _maps(ours))
        size = f"{name}, {len(batch['voxel_coords']):,} voxels"
        shown = "" if run == "PyTorch, float" else f"{differ:,} of {total:,}"
        table.add_row(size, run, f"{timing.cpu_ms:.1f}", f"{timing.cpu_ms / of_float:.3f}", shown)


def _inputs(batch: Batch) -> tuple[Any, Any, int]:
    return batch["voxel_features"], batch["voxel_coords"], 1


@torch.inference_mode()
def _run(network: Callable[..., Any], batch: Batch) -> Any:
    return network(*_inputs(batch))


def _pass(network: Callable[..., Any], batch: Batch) -> Callable[[], Any]:
    return lambda: _run(network, batch)


def _maps(heads: Any) -> list[torch.Tensor]:
    return [one for head in heads for one in head.values()]


def _convolutions(num_rounds: int) -> Table:
    table = _table("3x3 convolutions of codes in onnxruntime", "channels, map", "operator", "ms", "ratio")
    rng = np.random.default_rng(0)
    for num_in, num_out, size in CONVOLUTIONS:
        codes = rng.integers(0, 128, (1, num_in, size, size)).astype(np.uint8)
        weight = rng.integers(-50, 51, (num_out, num_in, 3, 3)).astype(np.int8)
        graphs = {"ConvInteger": _conv_integer, "Conv on whole numbers": _conv}
        sessions = {operator: _session(make, codes, weight) for operator, make in graphs.items()}
        runs = {operator: _call(session, codes) for operator, session in sessions.items()}
        results = [run() for run in runs.values()]
        assert all(np.array_equal(result, results[0]) for result in results)
        times = time_in_turn(runs, CPU, num_rounds, 1)
        first = times["ConvInteger"].cpu_ms
        for operator, timing in times.items():
            where = f"{num_in} to {num_out}, {size} x {size}"
            table.add_row(where, operator, f"{timing.cpu_ms:.1f}", f"{timing.cpu_ms / first:.3f}")
    return table


def _conv_integer(graph: Graph, codes: str, weight: str) -> str:
    return graph.cast(graph.node("ConvInteger", [codes, weight], "sum", pads=[1] * 4), np.float32, "whole")


def _conv(graph: Graph, codes: str, weight: str) -> str:
    operands = [graph.cast(codes, np.float32, "codes"), graph.cast(weight, np.float32, "weight")]
    return graph.node("Round", [graph.node("Conv", operands, "sum", pads=[1] * 4)], "whole")


def _session(make: Callable[[Graph, str, str], str], codes: Any, weight: Any) -> Any:
    graph = Graph()
    result = make(graph, graph.input("x", np.uint8, codes.shape), graph.initializer("w", weight))
    graph.output("y", result, [1, len(weight), *codes.shape[2:]])
    return new_session(graph.model("convolution", "0", "").SerializeToString(), "convolution")


def _call(session: Any, codes: Any) -> Callable[[], Any]:
    return lambda: session.run(None, {"x": codes})[0]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
