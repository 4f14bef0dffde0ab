"""What LayerLatency and LayerMemory share: which steps are measured, and where the numbers go.

In a measured step hooks are attached before the step and removed after it; in all others nothing is there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.loggers.csv_rows import append_rows, read_rows, write_rows
from cpq_train.training.detector import CenterPointDetector

Record = dict[str, Any]

STAGES = {"fit": ("train", "validation"), "validate": ("validate",)}
"""Trainer function -> stages of the rows that it writes."""


class LayerProbe(Callback):
    """Measures single steps of fit and validation, on rank 0, and appends a row per layer to a file.

    Nothing is measured where an engine runs in the network's place: it has no layers here.
    A resumed run goes on with the file of the run, without the rows of steps that it takes again.

    Args:
        every_n_steps: Steps from one that is measured to the next.
        first_step: The first one, counted from the start of the process; those before it warm up.
        num_logged: Layers, the largest, whose numbers go to the loggers too.
    """

    file_name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    def __init__(self, every_n_steps: int, first_step: int, num_logged: int) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("first_step", first_step, 0),
            ("num_logged", num_logged, 0),
        ):
            if value < least:
                raise UserError(f"{type(self).__name__}: {name} is {value}: expected {least} or more")
        self.every_n_steps, self.first_step, self.num_logged = every_n_steps, first_step, num_logged
        self._num_seen = {"train": 0, "validation": 0, "validate": 0}
        self._logged: dict[str, list[str]] = {}
        self._open = ExitStack()
        self._is_measuring = False
        self._step = 0

    @abstractmethod
    def measuring(self, trainer: Trainer, module: CenterPointDetector) -> AbstractContextManager[Any]:
        """Open while the step runs."""

    @abstractmethod
    def records(self) -> list[Record]:
        """A record per layer of the step that has just been closed, the largest first."""

    @abstractmethod
    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """What the loggers are told of some records."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._num_seen = dict.fromkeys(self._num_seen, 0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop_rows(trainer)  # a resumed run knows its step from here on

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._drop_rows(trainer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin(trainer, pl_module, "train")

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
            self._begin(trainer, pl_module, _validation_stage(trainer))

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

    def _begin(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        assert isinstance(module, CenterPointDetector)
        number = self._num_seen[stage] - self.first_step
        self._num_seen[stage] += 1
        is_due = number >= 0 and number % self.every_n_steps == 0
        self._is_measuring = trainer.is_global_zero and is_due and module.engine is None
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
        self._log(trainer, stage, records)

    def _log(self, trainer: Trainer, stage: str, records: Sequence[Record]) -> None:
        """Tell the loggers of the layers that were largest when a stage was first measured: whole curves."""
        largest = [record["layer"] for record in records[: self.num_logged]]
        chosen = self._logged.setdefault(stage, largest)
        metrics = self.metrics([record for record in records if record["layer"] in chosen])
        prefix = "" if stage == "train" else "val/"
        for logger in trainer.loggers:
            logger.log_metrics({prefix + name: value for name, value in metrics.items()}, self._step)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.file_name

    def _drop_rows(self, trainer: Trainer) -> None:
        """Rows that this run is going to write anew."""
        path = self._path(trainer)
        if trainer.is_global_zero and path.is_file():
            stages = STAGES[str(trainer.state.fn.value)]  # type: ignore[union-attr]
            rows = read_rows(path)
            kept = [r for r in rows if r["stage"] not in stages or _is_past(r, trainer.global_step)]
            write_rows(path, ("step", "stage", *self.columns), kept)


def _is_past(row: Mapping[str, str], global_step: int) -> bool:
    """Whether a resumed run will not come to it again: it validates after the step that it resumes behind."""
    return int(row["step"]) < global_step + (row["stage"] == "validation")


def _validation_stage(trainer: Trainer) -> str:
    return "validate" if trainer.state.fn == "validate" else "validation"
