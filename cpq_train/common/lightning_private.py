"""All that is used of Lightning's private members, under public names.

A new release of Lightning is checked here and in the test of this module. What has to start without torch
cannot use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.common.signals import raising_signals


class HookedTrainer(Trainer):
    """A Trainer that leaves signals alone, and restores the checkpoint that it is told and no other.

    Lightning's handlers save, and talk to other ranks, in the midst of whatever a signal interrupts, where
    the run may hang or the file tear (lightning issue 21406).

    Attributes:
        restored_checkpoint: What the present run restores, None where nothing. Lightning's `ckpt_path` says
            it only when the model has been configured.
    """

    restored_checkpoint: str | Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signal_connector = _NoSignals(self)
        self._checkpoint_connector = _GivenCheckpoint(self)

    def resumed_checkpoint(self, model: LightningModule, ckpt_path: str | Path | None) -> str | Path | None:
        """The checkpoint that a run restores, which `ckpt_path` or the word `last` names.

        Asked of every rank, when the launcher has started all of them.

        Args:
            model: The module.
            ckpt_path: What the trainer's method was given.
        """
        return ckpt_path

    @override
    def _run(
        self, model: LightningModule, ckpt_path: str | Path | None = None, weights_only: bool | None = None
    ) -> Any:
        self.restored_checkpoint = self.resumed_checkpoint(model, ckpt_path)
        return super()._run(model, self.restored_checkpoint, weights_only)


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer of a module, None where it has none; the public property raises then."""
    trainer: Trainer | None = module._trainer
    return trainer


class _NoSignals(_SignalConnector):
    @override
    def register_signal_handlers(self) -> None:
        pass


class _GivenCheckpoint(_CheckpointConnector):
    """Restores what it is told; Lightning's takes up any `hpc_ckpt_*.ckpt` in the folder of a job."""

    _hpc_resume_path = None

    @override
    def _parse_ckpt_path(
        self, state_fn: TrainerFn, ckpt_path: str | Path | None, model_provided: bool, model_connected: bool
    ) -> str | Path | None:
        if ckpt_path == "last":
            return ckpt_path  # the trainer's to decide, on all ranks alike
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    @override
    def restore_callbacks(self) -> None:
        with self._naming_damage("the state of its callbacks"):
            super().restore_callbacks()

    @override
    def restore_training_state(self) -> None:
        with self._naming_damage("its state of training"):
            super().restore_training_state()

    @contextmanager
    def _naming_damage(self, what: str) -> Iterator[None]:
        """Lightning takes what it finds in a checkpoint for what it wrote."""
        try:
            yield
        except (UserError, torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            where = f"checkpoint {str(self._ckpt_path)!r}"
            raise UserError(f"{where}: {what} cannot be restored ({said})") from error


class CheckpointsOnDemand(ModelCheckpoint):
    """A ModelCheckpoint that can be told to save; by itself it saves at its own moments only."""

    def saves_after_training_epoch(self, trainer: Trainer) -> bool:
        """Whether it looks at the metrics after a training epoch, and not after a validation."""
        return self._should_save_on_train_epoch_end(trainer)

    def save_last_now(self, trainer: Trainer) -> None:
        """Write `last.ckpt`, where `save_last` asks for it and this step was not just saved."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def num_logged_steps(fit_loop: Mapping[str, Any]) -> int:
    """The step at which a fit logs, of a checkpoint's `loops.fit_loop`; nothing public tells it."""
    number: int = fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    return number


def set_num_logged_steps(trainer: Trainer, number: int) -> None:
    """Log from this step on; resuming in the midst of an epoch, Lightning may count one too many."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = number


class LateWandbLogger(WandbLogger):
    """A WandbLogger whose run opens when all is known that it is started with.

    Lightning asks for the run, and so opens it, as soon as there is a trainer; before `describe_run` it gets
    one that does nothing.
    """

    def __init__(self, project: str) -> None:
        super().__init__(project=project)
        del self._wandb_init["anonymous"]  # W&B warns of it, whatever its value
        self._is_described = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run on rank 0, opened here."""
        return super().experiment if self._is_described else _DummyExperiment()

    @property
    def open_run(self) -> Any:
        """The W&B run, if it is open."""
        return self._experiment

    def describe_run(self, folder: str, **settings: Any) -> None:
        """Say what `wandb.init` is given; Lightning takes it at construction only.

        Args:
            folder: `dir` of the run.
            settings: Further arguments of `wandb.init`.
        """
        self._save_dir = folder
        self._wandb_init |= {"dir": folder, **settings}
        self._is_described = True

    def close_run(self, exit_code: int) -> None:
        """End the open run; Lightning leaves that to the end of the process."""
        assert self._experiment is not None
        self._experiment.finish(exit_code=exit_code)
        self._experiment = None

    def abandon_run(self) -> None:
        """Log nothing more."""
        self._experiment = None
        self._is_described = False


class HookedCLI(LightningCLI):
    """A LightningCLI with hooks: options of a single verb, what a checkpoint settles, callbacks of a run."""

    def add_verb_arguments(self, parser: LightningArgumentParser, verb: str) -> None:
        """Add options to one verb; Lightning's `add_arguments_to_parser` is not told for which one it is."""

    def take_settings_of_checkpoint(self) -> None:
        """Complete `config` once it is parsed.

        Lightning opens the file behind `--ckpt_path` here, and imports what its hyperparameters name.
        """

    def callbacks_of_run(
        self, named: Sequence[Callback], own: Sequence[Callback], has_logger: bool
    ) -> list[Callback]:
        """The callbacks of a run.

        Args:
            named: Those that `trainer.callbacks` names.
            own: Those that have options of their own.
            has_logger: Whether the run logs.
        """
        return [*named, *own]

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        named = config["callbacks"] or []
        named = named if isinstance(named, list) else [named]
        chosen = self.callbacks_of_run(named, callbacks, bool(config["logger"]))
        return super()._instantiate_trainer({**config, "callbacks": chosen}, [])

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with raising_signals():  # all is imported now, and there is work to end in order
            super()._run_subcommand(subcommand)

    @override
    def _parse_ckpt_path(self) -> None:
        self.take_settings_of_checkpoint()

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_verb_arguments(parser, subcommand)
        return parser
