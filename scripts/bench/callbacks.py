#!/usr/bin/env python
"""What callbacks add to a training step of the quickstart network.

Fits the qat arm with each callback in turn, present in every second step and measuring there. The median of
these steps over that of the steps between them is the cost of a measurement; divided by the interval at
which the callback measures by default it is the overhead of a long fit. The clock is the process's CPU time,
so that other work on the machine does not count. On CUDA the clock is wall time, and every step waits for the
device.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lidar_like import synthetic_batch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from machine import settle
from results import Row, write_rows
from torch.utils.data import DataLoader
from typing_extensions import override

from cpq_train.callbacks.amax_drift import AmaxDrift
from cpq_train.callbacks.layer_latency import LayerLatency
from cpq_train.callbacks.layer_memory import LayerMemory
from cpq_train.callbacks.throughput import Throughput
from cpq_train.common.errors import UserError
from cpq_train.data.dataset import Batch
from cpq_train.models import NetworkConfig
from cpq_train.training.detector import CenterPointDetector

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG, WEIGHTS = (
    REPOSITORY / "configs/quickstart_float.yaml",
    REPOSITORY / "checkpoints/quickstart_float.ckpt",
)
SCHEME = REPOSITORY / "configs/schemes/int8.yaml"
BATCH_SIZE = 4
NUM_WARM_UP_STEPS = 4


CALLBACKS: dict[str, tuple[Callable[[], Callback], int]] = {
    "AmaxDrift": (lambda: AmaxDrift(every_n_steps=1), AmaxDrift().every_n_steps or 1),
    "LayerLatency": (lambda: LayerLatency(every_n_steps=1, first_step=0), LayerLatency().every_n_steps or 1),
    "LayerMemory": (lambda: LayerMemory(every_n_steps=1, first_step=0), LayerMemory().every_n_steps or 1),
    "Throughput": (lambda: Throughput(every_n_steps=1), Throughput().every_n_steps or 1),
}
"""Name -> one that measures in every step it is present in, and its interval in steps by default."""


class Data(LightningDataModule):
    """One batch, again and again; calibration sees it too."""

    def __init__(self, batch: Batch, num_steps: int) -> None:
        super().__init__()
        self._batch, self._num_steps = batch, num_steps

    @override
    def train_dataloader(self) -> Any:
        return DataLoader([self._batch] * self._num_steps, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]  # a list is a data set

    def calibration_dataloader(self) -> list[Batch]:
        """See NuScenesDataModule."""
        return [self._batch]

    def calibration_info(self) -> dict[str, Any]:
        """See NuScenesDataModule."""
        return {"num_samples": 1}


class Clock(Callback):
    """Times every step from the first callback's start to the last one's end.

    Args:
        now: Seconds.
        subject: The callback that is present in every second step.

    Attributes:
        seconds: Times of the steps without and with it.
    """

    def __init__(self, now: Callable[[], float], subject: Callback) -> None:
        self.seconds: tuple[list[float], list[float]] = [], []
        self._now, self._subject = now, subject
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = self._now()


class ClockEnd(Callback):
    """Reads the clock at the end of a step, and lets the subject take part in the next one or not."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        clock, subject = self._clock, self._clock._subject
        was_present = subject in trainer.callbacks  # type: ignore[attr-defined]
        if batch_idx >= NUM_WARM_UP_STEPS:
            clock.seconds[was_present].append(clock._now() - clock._start)
        # A new list: Lightning is walking through this one.
        trainer.callbacks = [clock, *(() if was_present else (subject,)), self]  # type: ignore[attr-defined]


def main(callbacks: tuple[str, ...] = tuple(CALLBACKS), num_steps: int = 40, device: str = "cpu") -> None:
    """Measure the overhead of callbacks, on one thread.

    Args:
        callbacks: Which.
        num_steps: Steps that count, half of them with the callback.
        device: cpu or cuda.
    """
    if unknown := set(callbacks) - set(CALLBACKS):
        raise UserError(f"callbacks: got {sorted(unknown)[0]!r}, accepted: {', '.join(CALLBACKS)}")
    settle()
    content = yaml.safe_load(CONFIG.read_text())
    config = NetworkConfig(**content["model"]["network"])
    batch = synthetic_batch(config, content["data"]["num_sweeps"], BATCH_SIZE)
    rows: list[Row] = []
    for name in callbacks:
        without, present = _medians_ms(CALLBACKS[name][0](), config, batch, num_steps, device)
        interval = CALLBACKS[name][1]
        overhead = 100 * (present - without) / without / interval
        measured = {"step, ms": without, "with it, ms": present, "every n steps": interval}
        rows.append({"callback": name, **measured, "overhead, %": round(overhead, 3)})
    write_rows("callbacks", rows, device, steps=num_steps, voxels=len(batch["voxel_coords"]))


def _medians_ms(
    subject: Callback, config: NetworkConfig, batch: Batch, num_steps: int, device: str
) -> Sequence[float]:
    """Median milliseconds of a step without and with the callback."""
    clock = Clock(_synchronized if device == "cuda" else time.process_time, subject)
    data = Data(batch, NUM_WARM_UP_STEPS + num_steps)
    model = CenterPointDetector(config, weights=str(WEIGHTS), arm="qat", scheme=str(SCHEME))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock, subject, ClockEnd(clock)],
        )
        trainer.fit(model, datamodule=data)
    return [1e3 * median(seconds) for seconds in clock.seconds]


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        auto_cli(main, as_positional=False)
    except UserError as error:
        sys.exit(f"error: {error}")
