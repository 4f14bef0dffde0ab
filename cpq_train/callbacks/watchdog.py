"""Ends a run that hangs, and shows where."""

from __future__ import annotations

import faulthandler
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.common.errors import UserError


class Watchdog(Callback):
    """Ends a process with exit code 1 where training or validation stands still.

    Every rank watches itself, in a thread that needs neither Python nor the process group: the rank that
    hangs and those that wait for it write their stacks to stderr and end, and the launcher ends what is
    left. What comes before the first step and after the last (calibration, baselines, the report) is not
    watched.

    Args:
        timeout_s: How long a batch, the scoring of a validation, or a checkpoint may take; null watches
            nothing.
    """

    def __init__(self, timeout_s: float | None = 1800.0) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise UserError(f"watchdog.timeout_s is {timeout_s}: expected seconds above 0, or null")
        self.timeout_s = timeout_s
        self._is_armed = False

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._is_armed = self.timeout_s is not None
        self._rearm()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._rearm()

    @override
    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._rearm()

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rearm()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rearm()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rearm()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._disarm()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._disarm()

    def _rearm(self) -> None:
        if self._is_armed:
            assert self.timeout_s is not None
            assert sys.__stderr__ is not None
            faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=sys.__stderr__)

    def _disarm(self) -> None:
        if self._is_armed:
            faulthandler.cancel_dump_traceback_later()
        self._is_armed = False
