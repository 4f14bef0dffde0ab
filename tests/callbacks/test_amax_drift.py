"""AmaxDrift in fits: its file, its picture, its metrics, and that it changes nothing."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from tiny_model import BASE, OVERLAY, tiny_options
from torch import nn

from cpq_train.callbacks.amax_drift import COLUMNS, AmaxDrift, summary
from cpq_train.common.errors import UserError
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.ranges.watch import RangeReading, RangeWatch
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.verbs.cli import main

LEARNED = ["--model.ranges.amax", "learned", "--model.ranges.lr", "0.05"]
EPOCHS = ["--trainer.max_epochs", "2", "--checkpoint.save_top_k", "-1", "--checkpoint.every_n_epochs", "1"]
EVERY = "--amax_drift.every_n_steps"


def _command(root: Path, run: Path, ptq: Path, *more: str) -> list[str]:
    return ["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(root, run), "--model.weights", str(ptq), *more]


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "amax_drift.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def ptq(arms: dict[str, Path]) -> Path:
    return arms["ptq"] / "ptq.ckpt"


@pytest.fixture(scope="module")
def whole(ptq: Path, simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of six steps with learned ranges."""
    run = tmp_path_factory.mktemp("drift") / "whole"
    main(_command(simulated_root, run, ptq, *LEARNED, *EPOCHS, EVERY, "2"))
    return run


def test_the_file_has_a_row_per_quantizer_and_measured_step(whole: Path, ptq: Path) -> None:
    """The start is the PTQ checkpoint's, and each step's range is the one before its update."""
    rows = _rows(whole)
    assert tuple(rows[0]) == COLUMNS
    start = torch.load(ptq, weights_only=True)["state_dict"]
    names = {row["quantizer"] for row in rows}
    assert all(f"network.{name}._amax" in start for name in names)
    assert sorted({int(row["step"]) for row in rows}) == [0, 2, 4, 5]
    assert len(rows) == 4 * len(names)
    for row in rows:
        amax = start[f"network.{row['quantizer']}._amax"]
        if amax.dim() == 0:
            assert float(row["start_amax"]) == pytest.approx(float(amax), rel=1e-5)
        drift = math.log2(float(row["amax"]) / float(row["start_amax"]))
        assert abs(drift) < 1e-5 if row["step"] == "0" else abs(drift) < 0.5
        assert bool(row["sqnr_db"]) == row["quantizer"].endswith("_weight_quantizer")
        assert 0 <= float(row["clipped_share"]) < 0.2


def test_learned_ranges_are_seen_to_drift(whole: Path) -> None:
    moved = [row["amax"] != row["start_amax"] for row in _rows(whole) if row["step"] == "5"]
    assert sum(moved) > 0.9 * len(moved)
    with (whole / "metrics.csv").open(newline="") as file:
        logged = {int(r["step"]): r for r in csv.DictReader(file) if r.get("amax_drift/num_moved")}
    assert sorted(logged) == [0, 2, 4, 5]
    assert float(logged[0]["amax_drift/num_moved"]) == 0
    assert float(logged[5]["amax_drift/num_moved"]) > 0
    last = [r for r in _rows(whole) if r["step"] == "5"]
    expected = max(abs(math.log2(float(r["amax"]) / float(r["start_amax"]))) for r in last)
    assert float(logged[5]["amax_drift/largest_abs_log2"]) == pytest.approx(expected, abs=1e-4)
    expected = min(float(r["sqnr_db"]) for r in last if r["sqnr_db"])
    assert float(logged[5]["amax_drift/min_weight_sqnr_db"]) == pytest.approx(expected, rel=1e-4)
    assert not any(name.startswith("amax/") for name in logged[5])


def test_the_picture_shows_both_directions(whole: Path) -> None:
    pixels = matplotlib.image.imread(whole / "amax_drift.png")[300:, :, :3]
    is_wider = (pixels[..., 0] > pixels[..., 2] + 0.1).sum()
    is_narrower = (pixels[..., 2] > pixels[..., 0] + 0.1).sum()
    assert is_wider > 1000
    assert is_narrower > 1000


def test_a_resumed_run_writes_the_same_file(
    whole: Path, ptq: Path, simulated_root: Path, tmp_path: Path
) -> None:
    """Resumed behind step 2, over the rows of a run that went on to step 4; its start is still PTQ."""
    first = next((whole / "checkpoints").glob("epoch00*.ckpt"))
    state = torch.load(first, weights_only=True)["callbacks"]["AmaxDrift"]
    assert all(isinstance(amax, torch.Tensor) for amax in state["start_amax"].values())
    killed = (whole / "amax_drift.csv").read_text().splitlines(keepends=True)
    (tmp_path / "amax_drift.csv").write_text("".join(line for line in killed if not line.startswith("5,")))
    options = [*LEARNED, *EPOCHS, EVERY, "2", "--ckpt_path", str(first)]
    main(_command(simulated_root, tmp_path, ptq, *options))
    assert (tmp_path / "amax_drift.csv").read_text() == "".join(killed)


def test_off_leaves_no_trace_and_the_same_weights(
    whole: Path, ptq: Path, simulated_root: Path, tmp_path: Path
) -> None:
    off = [
        arg
        for name in ("layer_latency", "layer_memory", "throughput")
        for arg in (f"--{name}.every_n_steps", "null")
    ]
    main(_command(simulated_root, tmp_path, ptq, *LEARNED, *EPOCHS, EVERY, "null", *off))
    measured, plain = _state(whole), _state(tmp_path)
    assert measured.keys() == plain.keys()
    for name, value in measured.items():
        assert torch.equal(value, plain[name]), name
    assert (whole / "layer_memory.csv").exists()
    scores, plain_scores = (json.loads((run / "metrics.json").read_text()) for run in (whole, tmp_path))
    assert scores["metrics"] == plain_scores["metrics"]
    assert [path.name for path in tmp_path.glob("*.csv")] == ["metrics.csv"]
    assert not list(tmp_path.glob("amax_drift*"))
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert "AmaxDrift" not in checkpoint["callbacks"]


def test_only_the_qat_arm_is_measured(arms: dict[str, Path]) -> None:
    has_file = {arm for arm, folder in arms.items() if (folder / "amax_drift.csv").exists()}
    assert has_file == {"qat"}
    rows = _rows(arms["qat"])  # frozen ranges
    assert all(row["amax"] == row["start_amax"] for row in rows)
    assert {row["step"] for row in rows} == {"0", "2"}


def test_two_ranks_write_one_file(ptq: Path, simulated_root: Path, tmp_path: Path) -> None:
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command = _command(simulated_root, tmp_path, ptq, *ranks, "--data.batch_size", "1", EVERY, "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "cpq_train", *command], env=environment, check=True, timeout=300)
    rows = _rows(tmp_path)
    keys = [(row["step"], row["quantizer"]) for row in rows]
    assert len(set(keys)) == len(keys) > 0
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for name in ("layer_latency.csv", "layer_memory.csv"):  # rank 0's
        lines = [line.rsplit(",", line.count(",") - 2)[0] for line in (tmp_path / name).open()]
        assert len(set(lines)) == len(lines) > 1


READINGS = [
    RangeReading("a", 2.0, 1.0, 3.0, 0.25, math.nan),
    RangeReading("b", 1.0, 8.0, 3.0, 0.125, 30.0),
    RangeReading("c", 1.009, 1.0, 3.0, 0.0, math.inf),
    RangeReading("dynamic", math.nan, math.nan, 3.0, math.nan, math.nan),
]


def test_what_loggers_are_told() -> None:
    assert summary(READINGS) == {
        "amax_drift/largest_abs_log2": 3.0,
        "amax_drift/num_moved": 2,
        "amax_drift/median_clipped_share": 0.125,
        "amax_drift/min_weight_sqnr_db": 30.0,
    }
    assert summary(READINGS[3:]) == {}


class Recording(WandbLogger):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.seen = dict(metrics), step


def test_wandb_gets_each_amax_too(tmp_path: Path) -> None:
    watch = SimpleNamespace(readings=lambda: READINGS, close=lambda: None)
    logger = Recording(save_dir=tmp_path)
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, loggers=[logger])
    drift: Any = AmaxDrift()
    drift._watch, drift._measured_step = watch, 400
    drift.on_train_batch_end(trainer, None, None, None, 0)
    each = {"amax/a": 2.0, "amax/b": 1.0, "amax/c": 1.009}
    assert logger.seen == ({**summary(READINGS), **each}, 400)
    assert [row["clipped_share"] for row in _rows(tmp_path)] == ["0.25", "0.125", "0", ""]


def test_an_exception_takes_the_hooks_off() -> None:
    layer = nn.Conv2d(2, 2, 1)
    quantize_layer(layer, LayerScheme(QuantizerScheme(), QuantizerScheme()))
    drift: Any = AmaxDrift()
    drift._watch = RangeWatch(layer, {})
    assert layer._forward_pre_hooks
    drift.on_exception(None, None, KeyboardInterrupt())
    assert not layer._forward_pre_hooks


def test_an_interval_of_no_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"amax_drift\.every_n_steps is 0: expected 1 or more, or null"):
        AmaxDrift(0)
