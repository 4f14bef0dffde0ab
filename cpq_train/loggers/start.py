"""When the loggers of a run open their logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.loggers.csv_run import CSVRunLogger
from cpq_train.loggers.wandb_run import WandbRunLogger
from cpq_train.training.detector import CenterPointDetector


class StartLoggers(Callback):
    """Opens W&B when the arm is known and nothing is computed yet, the CSV file when the step is known."""

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
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, CenterPointDetector)
    assert isinstance(data, NuScenesDataModule)
    for logger in _wandb_loggers(trainer):
        logger.start(trainer, module, data)


def _wandb_loggers(trainer: Trainer) -> list[WandbRunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRunLogger)]


@contextmanager
def logged_calibration(
    trainer: Trainer, module: CenterPointDetector, data: NuScenesDataModule, output: Path
) -> Iterator[None]:
    """Log what happens inside to W&B as the run of the folder of `output`, the checkpoint written there."""
    loggers = _wandb_loggers(trainer)
    status = "failed"
    try:
        for logger in loggers:
            logger.run_dir = output.parent
            logger.start(trainer, module, data)
        yield
        for logger in loggers:
            logger.log_checkpoint(output, ["last"])
        status = "success"
    finally:
        for logger in loggers:
            logger.finalize(status)
