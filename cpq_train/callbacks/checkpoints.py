"""Which checkpoints of a run are kept."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from cpq_train.callbacks.validations import has_validation, why_none
from cpq_train.common.lightning_private import CheckpointsOnDemand


class RunCheckpoints(CheckpointsOnDemand):
    """Lightning's ModelCheckpoint, whose `last.ckpt` is that of the last validation.

    Lightning (2.6) writes `last.ckpt` only together with a best one, so that it may lag behind the scores
    that a run reports; and it writes it again at the end of a run that had nothing left to do. In a fit that
    comes to no validation `last.ckpt` is that of the last epoch, and there is no best one.
    """

    _first_step = 0
    _has_scores = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step
        self._has_scores = has_validation(trainer)
        if not self._has_scores:
            rank_zero_warn(
                f"no validation falls within this fit ({why_none(trainer)}): no score, no metrics.json "
                "and no best checkpoint; last.ckpt is written after every epoch, and validate scores it"
            )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not self.saves_after_training_epoch(trainer):
            self.save_last_now(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_scores or not str(self.monitor).startswith("val/"):
            super().on_train_epoch_end(trainer, pl_module)
        if not self._has_scores or self.saves_after_training_epoch(trainer):
            self.save_last_now(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._first_step:
            super().on_train_end(trainer, pl_module)
