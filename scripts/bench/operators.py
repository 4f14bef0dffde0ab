"""What a training step gives a GPU to do, by count: operators, and places where the host waits.

    python scripts/bench/operators.py

Counted on the CPU, which takes a GPU's path for that, in the third step of each arm: targets, forward pass,
loss, backward pass; then decoding and NMS of its outputs. An operator of this project's own is one kernel
there, spconv's are not counted. Targets are made on the host in a fit, and their wait is none of the device.
"""

from __future__ import annotations

import torch
from arms_to_compare import run
from jsonargparse import auto_cli
from lidar_like import new_batch
from machine import settle
from results import Row, write_rows
from steps import ARMS, FLOAT, FLOAT_BF16, LEARNED, QAT, QAT_BF16, Workload, config_of

from cpq_train.common.kernels import as_on_gpu
from cpq_train.models.decode import PostProcessing, decode
from cpq_train.models.losses import center_loss
from cpq_train.models.targets import assign_targets
from cpq_train.profiling.operator_count import Count, counting_operators
from cpq_train.quantization.switches import compute_gradients_in

COMPARED = {FLOAT: FLOAT, QAT: FLOAT, LEARNED: FLOAT, FLOAT_BF16: FLOAT_BF16, QAT_BF16: FLOAT_BF16}
"""Arm -> the one that it is compared with."""

COUNTED_STEP = 2
NUM_BOXES = 40


def main(network: str = "quickstart") -> None:
    """Count, and put a table into the results of this machine.

    Args:
        network: full or quickstart.
    """
    settle()
    config, num_sweeps = config_of(network)
    work = Workload.of(config, new_batch(config, num_sweeps, 1, None, ""), "cpu")
    write_rows("operators", rows_of(work), network=network, batch=1)


def rows_of(work: Workload) -> list[Row]:
    """A row an arm."""
    work = work.with_learned_ranges()
    counts = {arm: _count(work, arm) for arm in COMPARED}
    rows: list[Row] = []
    for arm, parts in counts.items():
        steps = {name: _num_of_step(counts[name]) for name in (arm, COMPARED[arm])}
        rows.append(
            {
                "arm": arm,
                **{part: count.num_operators for part, count in parts.items()},
                "step": steps[arm],
                "against": COMPARED[arm],
                "ratio": steps[arm] / steps[COMPARED[arm]],
                "waits of a step": sum(parts[part].num_waits for part in ("forward", "loss", "backward")),
            }
        )
    return rows


def _num_of_step(parts: dict[str, Count]) -> int:
    return sum(parts[part].num_operators for part in ("forward", "loss", "backward"))


def _count(work: Workload, arm: str) -> dict[str, Count]:
    """Counts of the third step, by part."""
    how, config = ARMS[arm], work.networks["float"].config
    network = work.networks[how.network]
    compute_gradients_in(network, how.gradients)
    boxes = _boxes(work.batch["batch_size"])
    with as_on_gpu():
        for _ in range(COUNTED_STEP + 1):
            network.zero_grad()
            with counting_operators() as of_targets:
                targets = assign_targets(boxes, config)
            with how.precision():
                with counting_operators() as forward:
                    heads = run(network, work.batch)
                with counting_operators() as of_loss:
                    loss = center_loss(heads, targets)["loss"]
            with counting_operators() as backward:
                torch.autograd.backward([loss])
            with torch.no_grad(), counting_operators() as decoding:
                decode(heads, config, PostProcessing())
    return {
        "targets": of_targets,
        "forward": forward,
        "loss": of_loss,
        "backward": backward,
        "decoding and NMS": decoding,
    }


def _boxes(batch_size: int) -> torch.Tensor:
    boxes = torch.rand(batch_size, NUM_BOXES, 10, generator=torch.Generator().manual_seed(0))
    boxes[..., :2] = boxes[..., :2] * 80 - 40
    boxes[..., 3:6] += 1
    boxes[..., 9] = (boxes[..., 9] * 10).floor() + 1
    return boxes


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
