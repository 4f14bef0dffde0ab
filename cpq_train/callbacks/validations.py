"""Whether a fit comes to a validation."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def has_validation(trainer: Trainer) -> bool:
    """Whether a validation falls within a fit, from its first batch to its last; known once training starts.

    Where validations go by the clock nobody can tell, and it is taken that one does.
    """
    return trainer.enable_validation and _first_validation(trainer) <= _num_batches(trainer)


def why_none(trainer: Trainer) -> str:
    """The settings that leave a fit without a validation, for a sentence."""
    if not trainer.enable_validation:
        return f"trainer.limit_val_batches {trainer.limit_val_batches}"
    ends = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    said = [f"trainer.{name} {value}" for name, value in ends.items() if value not in (None, -1)]
    every = f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch}"
    if trainer.val_check_interval not in (None, 1.0):
        every += f", trainer.val_check_interval {trainer.val_check_interval}"
    return f"{every} with {', '.join(said)}"


def _first_validation(trainer: Trainer) -> float:
    """Batches of the fit up to its first validation."""
    between = 0 if trainer.val_check_batch is None else trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None:
        return between
    per_epoch = trainer.num_training_batches
    return (trainer.check_val_every_n_epoch - 1) * per_epoch + min(between, per_epoch)


def _num_batches(trainer: Trainer) -> float:
    """Batches of the fit; the last step of an epoch may sum up fewer than others."""
    per_epoch, per_step = trainer.num_training_batches, trainer.accumulate_grad_batches
    num = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs * per_epoch
    if trainer.max_steps >= 0 and per_epoch:
        num_epochs, rest = divmod(trainer.max_steps, math.ceil(per_epoch / per_step))
        num = min(num, num_epochs * per_epoch + rest * per_step)
    return num
