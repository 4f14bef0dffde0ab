"""Samples per second, and how much of the time a step waits for its data."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.callbacks.evaluation import log_equal


class Throughput(Callback):
    """Logs `throughput/samples_per_s` (over all ranks) and `throughput/data_wait_share` of training.

    Both are means since the last time they were logged, every `trainer.log_every_n_steps` steps. Waiting is
    what lies between the end of a step and the start of the next; validation is left out. The clock is the
    host's and nothing waits for a device, which Lightning's ThroughputMonitor does at every step on a GPU;
    over a few steps the host is as fast as the device.
    """

    def __init__(self) -> None:
        self._waiting_s = self._running_s = 0.0
        self._num_samples = 0
        self._since: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

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
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            total_s = self._waiting_s + self._running_s
            log_equal(
                pl_module,
                {
                    "throughput/samples_per_s": self._num_samples / total_s,
                    "throughput/data_wait_share": self._waiting_s / total_s,
                },
            )
            self._waiting_s, self._running_s, self._num_samples = 0.0, 0.0, 0

    def _lap(self) -> float:
        """Seconds since it was last called; 0 after a pause."""
        now = time.perf_counter()
        since, self._since = self._since, now
        return 0.0 if since is None else now - since
