"""Runs by the command line, as users start them: a fit with loading workers, its profile, several ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from results import Row, spread
from steps import MIB

from cpq_train.report.training_costs import THROUGHPUT_FILE
from gpu_checking.guard import Found, NotApplicable
from gpu_checking.setting import FLOAT_CHECKPOINT, Setting

NUM_WORKERS = 2
BATCH_SIZE = 2


def short_fit(setting: Setting) -> Found:
    """A QAT fit of the quickstart network with two data workers."""
    num_epochs, every = (1, 1) if setting.is_small else (6, 6)
    run = setting.folder / "fit"
    seconds = setting.verb(
        "fit",
        *setting.quickstart(setting.ptq),
        *("--data.num_workers", NUM_WORKERS, "--data.batch_size", BATCH_SIZE),
        *("--trainer.max_epochs", num_epochs, "--trainer.limit_val_batches", 0),
        *("--throughput.every_n_steps", every, "--trainer.default_root_dir", run),
    )
    with (run / THROUGHPUT_FILE).open() as file:
        told = list(csv.DictReader(file))
    steady = told[len(told) // 2 :]  # the first half starts workers and kernels
    row: Row = {
        "steps": int(told[-1]["step"]) + 1,
        "steps/s": spread([float(line["samples_per_s"]) / BATCH_SIZE for line in steady]),
        "waiting for data, share": spread([float(line["data_wait_share"]) for line in steady]),
        "whole command, s": seconds,
    }
    return Found([row])


def profile_of_fit(setting: Setting) -> Found:
    """`profile` of the checkpoint of that fit."""
    checkpoint = setting.folder / "fit" / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        raise NotApplicable("the fit left no checkpoint")
    output = setting.folder / "profile"
    step = "false" if setting.is_small else "true"
    given = ("--sample", "first", "--num_passes", setting.num_rounds, "--training_step", step)
    setting.verb("profile", *setting.quickstart(checkpoint), *given, "--output", output)
    return Found(_profiled(output))


def _profiled(folder: Path) -> list[Row]:
    summary = json.loads((folder / "profile.json").read_text())["summary"]
    evaluation: Row = {
        "of": "evaluation pass",
        "ms": summary["latency_ms"],
        "peak, MiB": summary["evaluation_peak_bytes"] / MIB,
    }
    training: Row = {
        "of": "forward pass of training",
        "ms": None,
        "peak, MiB": summary["training_peak_bytes"] / MIB,
    }
    steps = folder / "training_step.json"
    if not steps.exists():
        return [evaluation, training]
    (network,) = json.loads(steps.read_text())["networks"]
    return [evaluation, training, {"of": "training step", "ms": network["plain"]["ms"], "peak, MiB": None}]


def several_ranks(setting: Setting) -> Found:
    """`calibrate` and `validate` on one GPU and on all.

    Raises:
        NotApplicable: There is one.
    """
    num_ranks = torch.cuda.device_count() if setting.device == "cuda" else 1
    if num_ranks < 2:
        raise NotApplicable("one GPU" if setting.device == "cuda" else "no GPU")
    rows: list[Row] = []
    for verb in ("calibrate", "validate"):
        seconds = {n: _on_ranks(setting, verb, n) for n in (1, num_ranks)}
        for n, taken in seconds.items():
            rows.append({"verb": verb, "GPUs": n, "whole command, s": taken, "speed-up": seconds[1] / taken})
    return Found(rows)


def _on_ranks(setting: Setting, verb: str, num_ranks: int) -> float:
    folder = setting.folder / f"{verb}_on_{num_ranks}"
    weights = FLOAT_CHECKPOINT if verb == "calibrate" else setting.ptq
    written = ("--output", folder / "ptq.ckpt") if verb == "calibrate" else ()
    options = setting.quickstart(weights, num_ranks)
    return setting.verb(verb, *options, *written, "--trainer.default_root_dir", folder)
