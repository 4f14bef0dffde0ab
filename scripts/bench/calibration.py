"""What `calibrate` costs at full size: the pass that collects ranges, by calibrator, and AdaRound.

    python scripts/bench/calibration.py

The collecting pass is timed sample by sample (CPU time of one thread), beside a plain evaluation pass of the
same network; what a calibrator does when the last sample is through stands in a column of its own. AdaRound
learns one step a block: its peak is what tensors take above the network and its samples (what blocks read and
put out lies in files), its time a sample what a second sample adds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from machine import settle
from results import Row, spread, write_rows
from steps import CONFIGS, MIB, config_of

from cpq_train.data.dataset import Batch
from cpq_train.models import CenterPoint
from cpq_train.models.topology import blocks_of
from cpq_train.profiling.allocation import counting
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.ptq.adaround import round_adaptively
from cpq_train.quantization.ptq.twins import Twins
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme

METHODS = ("max", "percentile", "mse", "entropy")


def main(
    methods: tuple[str, ...] = METHODS, num_samples: int = 3, adaround: bool = True, network: str = "full"
) -> None:
    """Measure, and put two tables into the results of this machine.

    Args:
        methods: Of the inputs' ranges.
        num_samples: That count; one more warms up.
        adaround: Measure AdaRound too, on 1 and on 2 samples.
        network: full or quickstart.
    """
    settle()
    config, num_sweeps = config_of(network)
    batches = [synthetic_batch(config, num_sweeps, 1, first_seed=seed) for seed in range(num_samples + 1)]
    rows = [_collecting(_prepared(method, config), method, batches) for method in methods]
    write_rows("calibration", rows, network=network, samples=num_samples, clock="CPU time")
    if adaround:
        prepared = _prepared("max", config)
        with collecting_ranges(prepared):
            _run(prepared, batches[0])
        prepared.eval()
        one, two = (_adaround(prepared, batches[:number]) for number in (1, 2))
        row = {
            "samples 1, MiB": one[0],
            "samples 2, MiB": two[0],
            "a sample, MiB": two[0] - one[0],
            "samples 1, s": one[1],
            "samples 2, s": two[1],
            "a sample, s": two[1] - one[1],
        }
        write_rows("calibration_adaround", [row], network=network, clock="CPU time")


def _prepared(method: str, config: Any) -> CenterPoint:
    scheme = Scheme.from_file(CONFIGS / "schemes" / "int8.yaml")
    chosen: Any = {"method": method}
    inputs = replace(scheme.defaults.input, **chosen)
    torch.manual_seed(0)
    network = CenterPoint(config)
    prepare(
        network, replace(scheme, defaults=replace(scheme.defaults, input=inputs)), network.example_input()
    )
    network.dense_channels_last()
    return network


def _collecting(network: CenterPoint, method: str, batches: Sequence[Batch]) -> Row:
    with collecting_ranges(network):
        _run(network, batches[0])  # a plain pass needs ranges
    with torch.inference_mode(), frozen(network.eval()):
        plain = [_seconds(network, batch) for batch in batches][1:]
    with collecting_ranges(network):
        collecting = [_seconds(network, batch) for batch in batches][1:]
        begun_s = time.process_time()
    return {
        "calibrator": method,
        "evaluation, s a sample": spread(plain),
        "collecting, s a sample": spread(collecting),
        "at the end, s": round(time.process_time() - begun_s, 2),
    }


def _adaround(network: CenterPoint, batches: Sequence[Batch]) -> tuple[float, float]:
    """MiB above what was there before, and seconds."""
    twins, blocks = Twins.of(network, batches, _run), list(blocks_of(network))
    begun_s = time.process_time()
    round_adaptively(twins, blocks, num_steps=1)
    seconds = time.process_time() - begun_s
    with counting(torch.device("cpu")) as allocator:
        round_adaptively(twins, blocks, num_steps=1)
        return round(allocator.take_peak() / MIB, 1), round(seconds, 2)


def _run(network: Any, batch: Batch) -> Any:
    return network(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])


def _seconds(network: CenterPoint, batch: Batch) -> float:
    start_s = time.process_time()
    _run(network, batch)
    return time.process_time() - start_s


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
