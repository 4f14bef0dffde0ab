"""The two exact ways to convolve codes that ONNX has, in onnxruntime, at sizes of the 0.1 m network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table

from cpq_train.export.engine import new_session
from cpq_train.export.graph import Graph
from cpq_train.profiling.interleaved import time_in_turn

CONVOLUTIONS = ((128, 128, 128), (256, 256, 64), (512, 64, 128), (64, 64, 128))
"""Input channels, output channels, rows and columns of the map."""

CPU = torch.device("cpu")


def convolutions_of_codes(num_rounds: int) -> Table:
    """What 3x3 convolutions take as ConvInteger, and as Conv on whole numbers.

    Args:
        num_rounds: Calls of each that count.
    """
    table = Table("channels, map", "operator", title="3x3 convolutions of codes in onnxruntime")
    for column in ("ms", "ratio"):
        table.add_column(column, justify="right")
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
