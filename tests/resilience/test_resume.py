"""A run that dies in any step ends, once resumed, with the bits of one that never did."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_failure import Killed, Options, assert_equal, weights

from cpq_train.verbs.cli import main

LOGGED = ("--trainer.log_every_n_steps", "2", "--amax_drift.every_n_steps", "2")
TIMES = ("throughput/", "latency_ms/", "memory_mib/", "val/latency_ms/", "val/memory_mib/")
"""Beginnings of the names of what no two runs have alike."""

POLICIES = {
    "moving": (
        *("--model.ranges.amax", "moving", "--model.ranges.every_num_steps", "2"),
        *("--trainer.val_check_interval", "2"),
    ),
    "moving_accumulated": ("--model.ranges.amax", "moving", "--trainer.accumulate_grad_batches", "2"),
    "learned_with_workers": ("--model.ranges.amax", "learned", "--data.num_workers", "2"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_death(
    policy: str, fit_options: Options, kill_in_step: Callable[[int], None], tmp_path: Path
) -> None:
    more = (*POLICIES[policy], *LOGGED)
    main(fit_options(tmp_path / "whole", *more))
    killed = fit_options(tmp_path / "killed", *more)
    for step in (3, 4):
        kill_in_step(step)
        with pytest.raises(Killed):
            main(killed)
    main(killed)
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert_equal(_start_amax(tmp_path / "whole"), _start_amax(tmp_path / "killed"))
    for file in ("metrics.csv", "amax_drift.csv"):
        assert _rows(tmp_path / "whole" / file) == _rows(tmp_path / "killed" / file)


def _start_amax(run: Path) -> Any:
    """The ranges that a run measures its drift from."""
    states = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    return states["AmaxDrift"]["start_amax"]


def _rows(file: Path) -> list[dict[str, str]]:
    """What was logged, but for times and memory, and rows of these alone."""
    with file.open(newline="") as text:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith(TIMES)} for row in csv.DictReader(text)
        ]
    return [row for row in rows if row.keys() - {"step", "epoch"}]
