"""Samples per second, and how much of the time a step waits for its data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.loggers.csv_rows import append_rows, rows_before, write_rows
from cpq_train.report.training_costs import THROUGHPUT_COLUMNS, THROUGHPUT_FILE


class Throughput(Callback):
    """Samples per second (over all ranks) of training, and the share of its time that waits for data.

    Both are means since the last time, taken every `every_n_steps` steps, before each validation and at the
    end. They are written to `throughput.csv` in the run directory and logged as `throughput/samples_per_s`
    and `throughput/data_wait_share`. Waiting is what lies between the end of a step and the start of the
    next; validation is left out. The clock is rank 0's and nothing waits for a device, which Lightning's
    ThroughputMonitor does at every step on a GPU; over a few steps the host is as fast as the device.

    Args:
        every_n_steps: Optimizer steps from one time to the next; null measures nothing.
    """

    def __init__(self, every_n_steps: int | None = 100) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"throughput.every_n_steps is {every_n_steps}: expected 1 or more, or null")
        self.every_n_steps = every_n_steps
        self._waiting_s = self._running_s = 0.0
        self._num_samples = self._num_steps = 0
        self._since: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        self._since, self._num_steps = None, trainer.global_step
        if trainer.is_global_zero:
            file = _file(trainer)
            write_rows(file, THROUGHPUT_COLUMNS, rows_before(file, trainer.global_step))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waiting_s += self._lap()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running_s += self._lap()
        self._num_samples += int(batch["batch_size"]) * trainer.world_size
        has_stepped = trainer.global_step > self._num_steps  # it accumulates gradients otherwise
        self._num_steps = trainer.global_step
        if has_stepped and self.every_n_steps and self._num_steps % self.every_n_steps == 0:
            self._tell(trainer)

    def _forget(self) -> None:
        self._waiting_s, self._running_s, self._num_samples = 0.0, 0.0, 0

    def _finish(self, trainer: Trainer) -> None:
        """Tell of the steps since the last time, and forget when the last of them ended."""
        if self._num_samples:
            self._tell(trainer)
        self._since = None

    def _tell(self, trainer: Trainer) -> None:
        total_s = self._waiting_s + self._running_s
        values = {
            "samples_per_s": self._num_samples / total_s,
            "data_wait_share": self._waiting_s / total_s,
        }
        self._forget()
        if self.every_n_steps is not None and trainer.is_global_zero:
            step = max(self._num_steps - 1, 0)  # that of everything else that a step logs
            append_rows(_file(trainer), THROUGHPUT_COLUMNS, [{"step": step, **values}])
            for logger in trainer.loggers:
                logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, step)

    def _lap(self) -> float:
        """Seconds since it was last called; 0 after a pause."""
        now = time.perf_counter()
        since, self._since = self._since, now
        return 0.0 if since is None else now - since


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / THROUGHPUT_FILE
