"""What LayerLatency and LayerMemory share: which steps are measured, and where the numbers go.

In a measured step hooks are attached before the step and removed after it; in all others nothing is there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.loggers.csv_rows import append_rows, read_rows, write_rows
from cpq_train.loggers.csv_run import CSVRunLogger
from cpq_train.training.detector import CenterPointDetector

Record = dict[str, Any]

NUM_AFTER = 2
"""Steps that follow the first measured one where an interval is short: LayerMemory's, and AmaxDrift's."""


class LayerProbe(Callback):
    """Measures single steps of fit and validation, on rank 0, and appends a row per layer to a file.

    From one validation to the next, and in every validation, batch `first_step` is measured and then every
    `every_n_steps`-th; where that ends too soon, the last but two (`LayerMemory`: the last but one). A
    resumed run measures the batches that an undisturbed one would have, and goes on with its file, without
    the rows of steps that it takes again. Nothing is measured where an engine runs in the network's place: it
    has no layers here.

    Args:
        every_n_steps: Batches from one that is measured to the next; null measures nothing.
        first_step: The first one of an interval, counted from 0; those before it warm up.
        num_logged: Layers, the largest, whose numbers go to the loggers too, `metrics.csv` left out.
    """

    file_name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    shift: ClassVar[int]
    """Batches by which it measures later than others where an interval is short."""

    def __init__(self, every_n_steps: int | None, first_step: int, num_logged: int) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("first_step", first_step, 0),
            ("num_logged", num_logged, 0),
        ):
            if value is not None and value < least:
                group, or_null = self.file_name.removesuffix(".csv"), ", or null" * (name == "every_n_steps")
                raise UserError(f"{group}.{name} is {value}: expected {least} or more{or_null}")
        self.every_n_steps, self.first_step, self.num_logged = every_n_steps, first_step, num_logged
        self._logged: dict[str, list[str]] = {}
        self._of_validation: tuple[Sequence[Record], int] | None = None
        self._num_batches_of_fit = math.inf
        self._open = ExitStack()
        self._is_measuring = False
        self._step = 0

    @abstractmethod
    def measuring(self, trainer: Trainer, module: CenterPointDetector) -> AbstractContextManager[Any]:
        """Open while the step runs."""

    @abstractmethod
    def records(self) -> list[Record]:
        """A record per layer of the step that was just closed, the largest first; the whole is the last."""

    @abstractmethod
    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """What the loggers are told of some records."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_batches_of_fit = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        # A resumed run knows its step from here on, and takes the steps from it on again.
        self._drop_rows(trainer, {"train": trainer.global_step, "validation": trainer.global_step + 1})

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            stage = _validation_stage(trainer)
            self._drop_rows(trainer, {stage: trainer.global_step if stage == "validation" else 0})

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._of_validation is not None:
            records, step = self._of_validation
            self._of_validation = None
            self._log(trainer, "validation", records, step)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin(trainer, pl_module, self._place(trainer, batch_idx))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end(trainer, "train")

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._begin(trainer, pl_module, (batch_idx, trainer.num_val_batches[dataloader_idx]))

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._end(trainer, _validation_stage(trainer))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def _place(self, trainer: Trainer, batch_idx: int) -> tuple[float, float]:
        """How many batches of the present validation interval come before a batch, and how many it has."""
        per_epoch, num_epochs = trainer.num_training_batches, trainer.check_val_every_n_epoch or 1
        between = trainer.val_check_batch or math.inf  # none where validations go by the clock
        if between < per_epoch:
            return batch_idx % between, between
        number = trainer.current_epoch % num_epochs * per_epoch + batch_idx
        return number, min(num_epochs * per_epoch, self._num_batches_of_fit)

    def is_due(self, number: float, num_batches: float) -> bool:
        """Whether the batch behind `number` others, of an interval of `num_batches`, is measured."""
        first = min(self.first_step, max(num_batches - 1 - NUM_AFTER, 0) + self.shift, num_batches - 1)
        every = self.every_n_steps
        return every is not None and number >= first and (number - first) % every == 0

    def _begin(self, trainer: Trainer, module: LightningModule, place: tuple[float, float]) -> None:
        assert isinstance(module, CenterPointDetector)
        self._is_measuring = trainer.is_global_zero and module.engine is None and self.is_due(*place)
        if self._is_measuring:
            self._step = trainer.global_step
            self._open.enter_context(self.measuring(trainer, module))

    def _end(self, trainer: Trainer, stage: str) -> None:
        if not self._is_measuring:
            return
        self._is_measuring = False
        self._open.close()
        records = self.records()
        append_rows(
            self._path(trainer),
            ("step", "stage", *self.columns),
            ({"step": self._step, "stage": stage, **record} for record in records),
        )
        if stage == "train":
            self._log(trainer, stage, records, self._step)
        else:  # one that is interrupted comes again
            self._of_validation = records, max(self._step - 1, 0)  # at the step of its scores

    def _log(self, trainer: Trainer, stage: str, records: Sequence[Record], step: int) -> None:
        """Tell the loggers of the layers that were largest when a stage was first measured: whole curves."""
        *layers, whole = records
        chosen = self._logged.setdefault(stage, [record["layer"] for record in layers[: self.num_logged]])
        shown = [record for record in layers if record["layer"] in chosen]
        prefix = "" if stage == "train" else "val/"
        for logger in trainer.loggers:
            of_layers = [] if isinstance(logger, CSVRunLogger) else shown  # the file beside it has them all
            metrics = self.metrics([whole, *of_layers])
            logger.log_metrics({prefix + name: value for name, value in metrics.items()}, step)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.file_name

    def _drop_rows(self, trainer: Trainer, first_steps: Mapping[str, int]) -> None:
        """Drop rows that this run writes anew: of each stage those from a step on."""
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            rows = read_rows(path)
            kept = [row for row in rows if int(row["step"]) < first_steps.get(row["stage"], math.inf)]
            if len(kept) < len(rows):
                write_rows(path, ("step", "stage", *self.columns), kept)


def _validation_stage(trainer: Trainer) -> str:
    return "validate" if trainer.state.fn == "validate" else "validation"
