#!/usr/bin/env python
"""What deployment files cost in onnxruntime, against the network in PyTorch that they were made of.

From voxels to heads, or with `--dense` from the map to heads, on one thread: medians of CPU time, all in
turn in one process. Weights are random, ranges those of the cloud at hand. "Float biases" is INT8 as it was
trained before biases were whole numbers in the sum. The dense part of a file starts from the map as the file
has it: portable-fast has codes in bytes, the others fp32.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from convolutions_of_codes import CPU, convolutions_of_codes
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from machine import settle
from numpy.typing import NDArray
from results import Row, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cpq_train.arms.structure import restructure
from cpq_train.common.arm_names import Arm
from cpq_train.common.errors import UserError
from cpq_train.export.engine import new_session
from cpq_train.export.graph import onnx
from cpq_train.export.parts import MAP
from cpq_train.export.plan import COORDS, FEATURES
from cpq_train.export.planning import output_name
from cpq_train.export.targets import TARGETS
from cpq_train.export.writing import plan_for
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.profiling.interleaved import time_in_turn
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    "quickstart": REPOSITORY / "configs/quickstart_float.yaml",
    "full": REPOSITORY / "configs/centerpoint_voxel01.yaml",
}

FLOAT, BEFORE, NOW = "PyTorch, float", "PyTorch, INT8, float biases", "PyTorch, INT8"

NUMBERS = ("of float", "of float biases", "ms", "differ", "MB")
"""Columns of the table that hold numbers."""

Maps: TypeAlias = dict[str, NDArray[Any]]
"""Name of an output -> its values."""

Voxels: TypeAlias = tuple[Tensor, Tensor]
"""Their features, and their samples and cells."""

Run: TypeAlias = Callable[[], Maps]


def main(
    networks: tuple[str, ...] = tuple(CONFIGS),
    num_rounds: int = 9,
    dense: bool = False,
    convolutions: bool = False,
) -> None:
    """Measure.

    Args:
        networks: Of `CONFIGS`; random weights, ranges of the cloud at hand.
        num_rounds: Passes of each that count.
        dense: The dense parts alone, TensorRT's file too.
        convolutions: Compare Conv on whole numbers with ConvInteger too.
    """
    if unknown := set(networks) - set(CONFIGS):
        raise UserError(f"networks: got {sorted(unknown)[0]!r}, accepted: {', '.join(CONFIGS)}")
    settle()
    table = Table(title=f"{'Dense part' if dense else 'Network'} alone, CPU time of one thread")
    for column in ("network, voxels", "runs as", *NUMBERS):
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    rows = [row for name in networks for row in _measure(name, dense, num_rounds, table)]
    write_rows("deployment_dense" if dense else "deployment", rows, rounds=num_rounds, clock="CPU time")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if convolutions:
        console.print(convolutions_of_codes(num_rounds))


def _measure(name: str, is_dense: bool, num_rounds: int, table: Table) -> list[Row]:
    voxels, networks = _networks(name)
    runs = {run: _in_pytorch(network, voxels, is_dense) for run, network in networks.items()}
    targets = [name for name, target in TARGETS.items() if target.part == "whole"]
    sizes = {}
    for target in [*targets, "tensorrt"] if is_dense else targets:
        model = _model(target, networks[NOW])
        runs[target] = _in_onnxruntime(model, networks[NOW], voxels, is_dense)
        sizes[target] = model.ByteSize()
    found = {run: call() for run, call in runs.items()}
    times = {run: one.cpu_ms for run, one in time_in_turn(runs, CPU, num_rounds, 1).items()}
    total = sum(values.size for values in found[NOW].values())
    for run, ms in times.items():
        differ = sum(int((values != found[NOW][name]).sum()) for name, values in found[run].items())
        table.add_row(
            f"{name}, {len(voxels[0]):,}",
            run,
            *(f"{ms / times[reference]:.2f}" for reference in (FLOAT, BEFORE)),
            f"{ms:.1f}",
            f"{differ:,} of {total:,}" if run not in (FLOAT, BEFORE) else "",
            f"{sizes[run] / 1e6:.2f}" if run in sizes else "",
        )
    table.add_section()
    return [
        {"network": name, "runs as": run, "ms": ms, "of float": ms / times[FLOAT]}
        for run, ms in times.items()
    ]


def _networks(name: str) -> tuple[Voxels, dict[str, CenterPoint]]:
    """Voxels of a cloud, and networks of the same weights with their ranges on it."""
    content = yaml.safe_load(CONFIGS[name].read_text())
    config = NetworkConfig(**content["model"].get("network", {}))
    batch = synthetic_batch(config, content["data"].get("num_sweeps", 10), 1)
    voxels = batch["voxel_features"], batch["voxel_coords"]
    int8 = Scheme.from_file(str(REPOSITORY / "configs/schemes/int8.yaml"))
    before = replace(int8, defaults=replace(int8.defaults, bias="float"))
    networks = {}
    for run, scheme in {FLOAT: None, BEFORE: before, NOW: int8}.items():
        arm: Arm = "ptq" if scheme else "float"
        network = restructure(_float_network(config), arm, scheme, None).network.eval()
        network.dense_channels_last()
        with torch.no_grad(), collecting_ranges(network):
            network(*voxels, 1)
        networks[run] = network
    return voxels, networks


def _float_network(config: NetworkConfig) -> CenterPoint:
    """Random weights; of BatchNorms too, which become biases."""
    torch.manual_seed(0)
    network = CenterPoint(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.2, 0.4)
    return network


def _in_pytorch(network: CenterPoint, voxels: Voxels, is_dense: bool) -> Run:
    seen = _map_of(network, voxels)

    @torch.inference_mode()
    def run() -> Maps:
        heads = network.dense_head(network.backbone_2d(seen)) if is_dense else network(*voxels, 1)
        return {
            output_name(head, branch): values.numpy()
            for head, maps in enumerate(heads)
            for branch, values in maps.items()
        }

    return run


@torch.inference_mode()
def _map_of(network: CenterPoint, voxels: Voxels) -> Tensor:
    seen: Tensor = network.map_to_bev_module(network.backbone_3d(*voxels, 1))
    return seen


def _model(target: str, network: CenterPoint) -> Any:
    chosen = TARGETS[target]
    return chosen.model_of(plan_for(chosen, network), "0", "")


def _in_onnxruntime(model: Any, network: CenterPoint, voxels: Voxels, is_dense: bool) -> Run:
    names = [output.name for output in model.graph.output]
    feed = {FEATURES: voxels[0].numpy(), COORDS: voxels[1][:, 1:].int().numpy()}
    if model.graph.input[0].name == MAP:
        feed = {MAP: _map_of(network, voxels).contiguous().numpy()}
    elif is_dense:
        seam = _seam(model)
        (seen,) = _session(_between(model, list(feed), [seam])).run(None, feed)
        model, feed = _between(model, [seam], names), {seam: seen}
    session = _session(model)
    return lambda: dict(zip(names, session.run(names, feed), strict=True))


def _seam(model: Any) -> str:
    """The map that the voxels of a whole network are scattered to: numbers, or codes."""
    made_by = {node.output[0]: node for node in model.graph.node}
    (scatter,) = (node.output[0] for node in model.graph.node if node.op_type == "ScatterND")
    (moved,) = (name for name, node in made_by.items() if scatter in node.input)
    return next(str(name) for name, node in made_by.items() if moved in node.input)


def _between(model: Any, inputs: list[str], outputs: list[str]) -> Any:
    """The part of a file from some of its tensors to others."""
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(inputs, outputs)


def _session(model: Any) -> Any:
    return new_session(model.SerializeToString(), model.graph.name)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
