"""How a run is getting on: lines for its log, where there is no terminal to draw a bar on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from cpq_train.callbacks.resume_point import ResumePoint
from cpq_train.common.errors import UserError
from cpq_train.common.progress import EVERY_N_SECONDS, Lines, draws_bars, duration, rate, say
from cpq_train.evaluation.gaps import HEADLINE


class ProgressLines(Callback):
    """Prints how far training and evaluation have come, on stderr, where stdout is no terminal.

    In training: a line every so often, one for each validation, and one for what `ResumePoint` saved. The
    loss is the one of rank 0 that the bar shows, and is read, which waits for the device, for a line only.
    Samples/s are those of all ranks since the line before, validation left out. The time left has the other
    steps take as long as those of this process so far, with their validations.

    Args:
        every_n_seconds: Least time between two lines of a kind; null prints none.
    """

    def __init__(self, every_n_seconds: float | None = EVERY_N_SECONDS) -> None:
        if every_n_seconds is not None and not every_n_seconds > 0:
            raise UserError(
                f"progress.every_n_seconds is {every_n_seconds}: expected a number above 0, or null"
            )
        self.every_n_seconds = every_n_seconds
        self._training: _Training | None = None
        self._evaluation: Lines | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = None
        if self.every_n_seconds is not None and _prints(trainer):
            self._training = _Training(trainer, self.every_n_seconds)
            say(f"training {'goes on' if trainer.global_step else 'begins'}: {self._training.place(trainer)}")

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._training is not None:
            self._training.say_saved(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._training is not None:
            self._training.count(trainer, int(batch["batch_size"]) * trainer.world_size)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            say(f"training ends: {self._training.step(trainer)}, {duration(self._training.elapsed_s)}")

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._training.say_saved(trainer)
        if not trainer.sanity_checking:
            self._begin(trainer, "Validating", trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "Testing", trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, "Predicting", trainer.num_predict_batches)

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.advance(1)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluation is None:
            return
        if self._training is None:
            self._evaluation.end()
        else:
            self._training.say_validated(trainer, self._evaluation.elapsed_s)
        self._evaluation = None

    on_test_end = on_predict_end = on_validation_end

    def _begin(self, trainer: Trainer, description: str, num_batches: list[int | float]) -> None:
        if self.every_n_seconds is not None and _prints(trainer):
            self._evaluation = Lines(f"{description} (batches)", sum(num_batches), self.every_n_seconds)


def _prints(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not draws_bars()


class _Training:
    """The lines of a fit, whose training begins now.

    Args:
        trainer: Of the fit.
        every_n_seconds: Least time between two lines of a kind.
    """

    def __init__(self, trainer: Trainer, every_n_seconds: float) -> None:
        self._every_n_seconds = every_n_seconds
        self._begun_s = self._said_s = self._counting_since_s = time.monotonic()
        self._begun_step, self._num_samples = trainer.global_step, 0
        self._num_steps = _num_steps(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._resume_point = next((c for c in callbacks if isinstance(c, ResumePoint)), None)
        self._saved_step, self._saved_said_s = trainer.global_step, -math.inf

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begun_s

    def place(self, trainer: Trainer) -> str:
        """Where training is; epochs count from 0, as in the names of checkpoints."""
        max_epochs = trainer.max_epochs or -1
        last_epoch = f"/{max_epochs - 1}" if max_epochs > 0 else ""
        return f"epoch {trainer.current_epoch}{last_epoch}, {self.step(trainer)}"

    def step(self, trainer: Trainer) -> str:
        """How many steps of the optimizer are done."""
        return f"step {trainer.global_step}" + (f"/{self._num_steps}" if self._num_steps else "")

    def count(self, trainer: Trainer, num_samples: int) -> None:
        """Take note of a batch's samples, over all ranks, and print a line where one is due."""
        self._num_samples += num_samples
        if time.monotonic() - self._said_s < self._every_n_seconds:
            return
        loss = trainer.callback_metrics.get("train/loss")
        said = [self.place(trainer), *([] if loss is None else [f"loss {float(loss):.4g}"])]
        self._said_s = time.monotonic()  # now that the device is done
        said.append(f"{rate(self._num_samples / (self._said_s - self._counting_since_s))} samples/s")
        self._counting_since_s, self._num_samples = self._said_s, 0
        num_done = trainer.global_step - self._begun_step
        if self._num_steps and num_done:
            num_left = self._num_steps - trainer.global_step
            said.append(f"{duration(self.elapsed_s / num_done * num_left)} left")
        say(", ".join(said))

    def say_saved(self, trainer: Trainer) -> None:
        """Say what has been saved since this was last said, if that is not just now."""
        step = self._saved_step if self._resume_point is None else self._resume_point.saved_step
        if step != self._saved_step and time.monotonic() - self._saved_said_s >= self._every_n_seconds:
            self._saved_step, self._saved_said_s = step, time.monotonic()
            say(f"saved at step {step}")

    def say_validated(self, trainer: Trainer, elapsed_s: float) -> None:
        """Print the scores of a validation that took so long."""
        self._counting_since_s += elapsed_s
        scores = ", ".join(_scores(trainer.callback_metrics))
        say(f"validation: {self.place(trainer)}, {scores}{', ' if scores else ''}{duration(elapsed_s)}")


def _num_steps(trainer: Trainer) -> int | None:
    """Steps of the whole fit; None where it has no end in sight."""
    num_steps = trainer.estimated_stepping_batches
    return int(num_steps) if 0 < num_steps < math.inf else None


def _scores(metrics: Mapping[str, Tensor]) -> Iterator[str]:
    """Each score of a validation, and how far it is from the baselines that it has."""
    for name in HEADLINE:
        if f"val/{name}" in metrics:
            arms = {"float": f"val/{name}_minus_float", "PTQ": f"val/{name}_minus_ptq"}
            gaps = [f"{float(metrics[key]):+.4f} to {arm}" for arm, key in arms.items() if key in metrics]
            yield f"{name} {float(metrics[f'val/{name}']):.4f}" + (f" ({', '.join(gaps)})" if gaps else "")
