"""Saves where training stands, often enough that a crash costs little, and in time when the run must stop.

Lightning writes its checkpoints in the midst of a step's end, before all counters know of it. Here they are
written where a step has ended in every respect: before the forward of the next, or before a validation.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.common.lightning_private import num_logged_steps, set_num_logged_steps
from cpq_train.common.signals import Request, Stopped, note_signals, raise_signals, received
from cpq_train.loggers import WandbRunLogger
from cpq_train.resilience.random_state import random_state, set_random_state
from cpq_train.resilience.resume import (
    PREVIOUS_FILE,
    RESUME_FILE,
    RESUME_KEY,
    checkpoint_folder,
    next_run_number,
)
from cpq_train.resilience.trainer import is_started_by_rank_0

Moment = Literal["before_step", "before_validation", "other"]

_BATCHES = "epoch_loop.batch_progress"
_VAL_BATCHES = "epoch_loop.val_loop.batch_progress"
"""Entries of a checkpoint's `loops`: how many batches of the epoch, and of the validation, are done."""


class ResumePoint(Callback):
    """Writes `checkpoints/resume.ckpt`, from which `--ckpt_path last` goes on as if nothing had happened.

    Written between two steps of the optimizer: every so often, before each validation, and when SIGTERM or
    SIGUSR1 asks the run to stop. The one before stays as `resume-previous.ckpt`.

    Args:
        every_n_minutes: Minutes of training that a crash may cost; null is no limit.
        every_n_steps: Steps of the optimizer that a crash may cost; null is no limit.

    Attributes:
        saved_step: The step that was saved last; before the first save the one that the fit began at.
    """

    def __init__(self, every_n_minutes: float | None = 10.0, every_n_steps: int | None = None) -> None:
        for name, value in (("every_n_minutes", every_n_minutes), ("every_n_steps", every_n_steps)):
            if value is not None and not value > 0:
                raise UserError(f"resume.{name} is {value}: expected a number above 0, or null")
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self._run_number, self._run_started_s, self._ordinal = 0, 0.0, 0
        self._saved_at_s, self.saved_step = 0.0, 0
        self._num_shared_val_batches = self._num_logged_steps = 0
        self._group: distributed.ProcessGroup | None = None
        self._moment: Moment = "other"
        self._loaded: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # A run that goes on has the number that its checkpoint says.
            goes_on = getattr(trainer, "continues_run", False) and bool(trainer.restored_checkpoint)  # type: ignore[attr-defined]
            is_asked = trainer.is_global_zero and not goes_on
            number = next_run_number(checkpoint_folder(trainer)) if is_asked else 0
            began = (number, time.time())
            self._run_number, self._run_started_s = trainer.strategy.broadcast(began)
            if distributed.is_available() and distributed.is_initialized():
                # Ranks agree through the CPU: a GPU's collective would wait for all of its work.
                self._group = distributed.new_group(backend="gloo")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._group = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at_s, self.saved_step = time.monotonic(), trainer.global_step
        note_signals()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore(trainer)
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients are being summed up, and no checkpoint holds them
        request, is_due = self._largest(received(), self._is_due(trainer))
        if request or is_due:
            self._save(trainer, "before_step")
        self._stop(trainer, Request(request))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What comes now writes files of its own, and no step is left after which a signal would be obeyed.
        raise_signals()
        self._stop(trainer, Request(self._largest(received())[0]))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_in_training(trainer):
            return
        self._restore(trainer)
        self._num_shared_val_batches = -self._largest(-int(sum(trainer.num_val_batches)))[0]
        if not 0 <= trainer.max_steps <= trainer.global_step:  # then Lightning would not validate again
            self._save(trainer, "before_validation")

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # One rank may have a batch more than another, with which it must not wait for an answer.
        if _is_in_training(trainer) and batch_idx < self._num_shared_val_batches:
            self._stop(trainer, Request(self._largest(received())[0]))

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._ordinal += 1
        checkpoint[RESUME_KEY] = {
            "run_number": self._run_number,
            "run_started_s": self._run_started_s,
            "ordinal": self._ordinal,
            "moment": self._moment,
            "random_states": _of_every_rank(random_state()),
        }
        loops = checkpoint["loops"]["fit_loop"]
        if self._moment == "before_step":
            _forget_present_batch(loops[_BATCHES])
        elif self._moment == "before_validation":
            _call_interrupted(loops[_VAL_BATCHES])

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loaded = checkpoint.get(RESUME_KEY)
        if loaded is not None and trainer.state.fn == "fit":
            self._loaded, self._ordinal = loaded, loaded["ordinal"]
            self._try_random_state(trainer, loaded)
            self._num_logged_steps = num_logged_steps(checkpoint["loops"]["fit_loop"])
            if getattr(trainer, "continues_run", False):
                self._run_number = loaded.get("run_number", 0)
                self._run_started_s = loaded["run_started_s"]

    def _restore(self, trainer: Trainer) -> None:
        """At the moment at which it was written, take up what a checkpoint holds beside Lightning's part."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        if loaded["moment"] == "before_step":
            set_num_logged_steps(trainer, self._num_logged_steps)
        elif loaded["moment"] == "before_validation":
            total = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            num_processed = total.state_dict()["processed"]
            total.load_state_dict({"ready": num_processed, "started": num_processed})
        self._set_random_state(trainer, loaded)

    def _try_random_state(self, trainer: Trainer, loaded: dict[str, Any]) -> None:
        """Fail here, where the file is named, and not in the first step."""
        now = random_state()
        try:
            self._set_random_state(trainer, loaded)
        finally:
            set_random_state(now)

    def _set_random_state(self, trainer: Trainer, loaded: dict[str, Any]) -> None:
        if trainer.global_rank < len(loaded["random_states"]):
            set_random_state(loaded["random_states"][trainer.global_rank])

    def _is_due(self, trainer: Trainer) -> bool:
        num_steps = trainer.global_step - self.saved_step
        if self.every_n_steps is not None and num_steps >= self.every_n_steps:
            return True
        # Rank 0's clock counts for all.
        minutes = (time.monotonic() - self._saved_at_s) / 60 if trainer.is_global_zero else 0.0
        return self.every_n_minutes is not None and num_steps > 0 and minutes >= self.every_n_minutes

    def _largest(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, self._group)
        largest: list[int] = tensor.tolist()
        return largest

    def _save(self, trainer: Trainer, moment: Moment) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = checkpoint_folder(trainer)
        newest = folder / RESUME_FILE
        if trainer.is_global_zero and newest.exists():
            newest.replace(folder / PREVIOUS_FILE)
        self._moment = moment
        trainer.save_checkpoint(newest, weights_only=False)
        self._moment = "other"
        self._saved_at_s, self.saved_step = time.monotonic(), trainer.global_step

    def _stop(self, trainer: Trainer, request: Request) -> None:
        if request:
            for logger in trainer.loggers:
                if isinstance(logger, WandbRunLogger):
                    logger.mark_preempting()
            file = checkpoint_folder(trainer) / RESUME_FILE
            said = f"saved at step {self.saved_step} in {str(file)!r}: --ckpt_path last goes on from there"
            # Lightning's launcher kills all ranks where one of its own ends with another code than 0.
            is_watched = not is_started_by_rank_0(trainer)
            raise Stopped(request, said if file.exists() else "nothing is saved", is_watched, is_agreed=True)


def _is_in_training(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _of_every_rank(state: Any) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states


def _forget_present_batch(progress: dict[str, Any]) -> None:
    """A batch was fetched that is not trained on before the checkpoint is resumed."""
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["completed"]
    progress["is_last_batch"] = False


def _call_interrupted(progress: dict[str, Any]) -> None:
    """To Lightning a validation with a batch begun and not ended is one to be run again."""
    progress["total"]["ready"] += 1
    progress["total"]["started"] += 1
    progress["current"] = dict.fromkeys(progress["current"], 0)
