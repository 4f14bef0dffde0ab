"""What of a fit's settings would fail only after an hour, told before it begins."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, LearningRateFinder

from cpq_train.callbacks.baselines import gap_names
from cpq_train.callbacks.evaluation import TRAINED_MAP
from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.evaluation.gaps import compared_metrics
from cpq_train.training.detector import CenterPointDetector


def check_fit(trainer: Trainer, model: CenterPointDetector, data: NuScenesDataModule) -> None:
    """See that a fit can come to its end.

    Raises:
        UserError: It has no end, a callback does not fit this network, or one monitors what nobody logs.
    """
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise UserError(
            "trainer.max_epochs and trainer.max_steps are -1: the schedule of the rate needs an end; "
            "accepted: one of them above 0"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_kind(callback)
        _check_monitor(callback, model, data)


def _check_kind(callback: Callback) -> None:
    why = {
        LearningRateFinder: "one rate for all weights, where model.optimizer has a schedule",
        BaseFinetuning: "parts of a network to be frozen, where all of this one is trained",
    }
    for kind, reason in why.items():
        if isinstance(callback, kind):
            raise UserError(
                f"trainer.callbacks names {type(callback).__name__}, which is for {reason}; accepted: any "
                f"but {' and '.join(sorted(one.__name__ for one in why))}"
            )


def _check_monitor(callback: Callback, model: CenterPointDetector, data: NuScenesDataModule) -> None:
    monitor, metrics = getattr(callback, "monitor", None), compared_metrics(data.task)
    scores = [f"val/{metric}" for metric in metrics]
    trained = [] if set(data.class_names) == set(data.task.names) else [TRAINED_MAP]
    accepted = (*scores, *trained, *gap_names(model.arm or "qat", metrics))
    if monitor is not None and monitor not in accepted and monitor not in losses(model):
        raise UserError(
            f"monitor of {type(callback).__name__} is {monitor!r}; accepted: {', '.join(accepted)}, and "
            "train/loss or other losses of training"
        )


def losses(model: CenterPointDetector) -> set[str]:
    """Names that training logs, see `models.losses` and `models.distillation`."""
    heads = range(len(model.network_config.class_groups))
    parts = {f"{part}_loss_head_{number}" for part in ("hm", "loc") for number in heads}
    distilled = set() if model.distillation is None else {"distill_heatmap", "distill_box", "distill_bev"}
    return {f"train/{name}" for name in ("loss", "grad_norm", *parts, *distilled)}
