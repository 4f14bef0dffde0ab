"""When the loggers of a run open their logs."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.detector import CenterPointDetector
from cpq_train.loggers.csv_run import CSVRunLogger
from cpq_train.loggers.wandb_run import WandbRunLogger


class StartLoggers(Callback):
    """Opens W&B when the arm is known and before anything is computed, the CSV file when the step is known."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _start_wandb(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVRunLogger):
                logger.start(trainer.global_step)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _start_wandb(trainer, pl_module)


def _start_wandb(trainer: Trainer, module: LightningModule) -> None:
    """Open the W&B run of a trainer, if it has one."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, CenterPointDetector)
    assert isinstance(data, NuScenesDataModule)
    for logger in trainer.loggers:
        if isinstance(logger, WandbRunLogger):
            logger.start(trainer, module, data)
