"""The installed Lightning still has the private members that we use, and they do what we use them for."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers import logger as fabric_logger
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.connectors import checkpoint_connector, signal_connector

from cpq_train.common.lightning_private import (
    CheckpointsOnDemand,
    HookedCLI,
    HookedTrainer,
    LateWandbLogger,
    num_logged_steps,
    set_num_logged_steps,
    trainer_of,
)

SIGNATURES = {
    "Trainer._run": (Trainer, ["self", "model", "ckpt_path", "weights_only"]),
    "_CheckpointConnector.__init__": (checkpoint_connector._CheckpointConnector, ["self", "trainer"]),
    "_CheckpointConnector._parse_ckpt_path": (
        checkpoint_connector._CheckpointConnector,
        ["self", "state_fn", "ckpt_path", "model_provided", "model_connected"],
    ),
    "_CheckpointConnector.restore_callbacks": (checkpoint_connector._CheckpointConnector, ["self"]),
    "_CheckpointConnector.restore_training_state": (checkpoint_connector._CheckpointConnector, ["self"]),
    "_SignalConnector.__init__": (signal_connector._SignalConnector, ["self", "trainer"]),
    "_SignalConnector.register_signal_handlers": (signal_connector._SignalConnector, ["self"]),
    "ModelCheckpoint._should_save_on_train_epoch_end": (ModelCheckpoint, ["self", "trainer"]),
    "ModelCheckpoint._should_skip_saving_checkpoint": (ModelCheckpoint, ["self", "trainer"]),
    "ModelCheckpoint._save_last_checkpoint": (ModelCheckpoint, ["self", "trainer", "monitor_candidates"]),
    "ModelCheckpoint._monitor_candidates": (ModelCheckpoint, ["self", "trainer"]),
    "LightningCLI._prepare_subcommand_parser": (LightningCLI, ["self", "klass", "subcommand", "kwargs"]),
    "LightningCLI._parse_ckpt_path": (LightningCLI, ["self"]),
    "LightningCLI._run_subcommand": (LightningCLI, ["self", "subcommand"]),
    "LightningCLI._instantiate_trainer": (LightningCLI, ["self", "config", "callbacks"]),
    "logger._DummyExperiment.__getattr__": (fabric_logger._DummyExperiment, ["self", "_"]),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    owner, expected = SIGNATURES[name]
    method = getattr(owner, name.rpartition(".")[2], None)
    assert method is not None, f"Lightning has no {name} any more"
    assert list(inspect.signature(method).parameters) == expected, f"Lightning's {name} has other parameters"


def test_a_module_without_a_trainer_has_none() -> None:
    module = BoringModel()
    assert trainer_of(module) is None
    module.trainer = Trainer(logger=False, barebones=True)
    assert trainer_of(module) is module.trainer


@pytest.mark.parametrize("name", ["_wandb_init", "_save_dir", "_experiment"])
def test_attributes_of_the_wandb_logger(name: str) -> None:
    logger = WandbLogger(project="p")
    assert hasattr(logger, name), f"Lightning's WandbLogger has no {name} any more"
    assert {"dir", "anonymous", "project"} <= logger._wandb_init.keys()


class _Trainer(HookedTrainer):
    def __init__(self, **options: Any) -> None:
        self.asked: list[str] = []
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        super().__init__(accelerator="cpu", max_epochs=1, **{**quiet, **options})

    def resumed_checkpoint(self, model: LightningModule, ckpt_path: str | Path | None) -> str | Path | None:
        self.asked.append(f"resume {ckpt_path}")
        return None


def test_the_trainer_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes what it is told, and takes no signals, which Lightning's own does."""
    taken: list[Any] = []
    monkeypatch.setattr(
        signal_connector._SignalConnector, "_register_signal", lambda self, *given: taken.append(given)
    )
    trainer = _Trainer(limit_train_batches=1, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(BoringModel(), ckpt_path="nowhere.ckpt")
    assert trainer.asked == ["resume nowhere.ckpt"]
    assert trainer.global_step == 1
    assert not taken
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", fast_dev_run=1, **quiet).fit(BoringModel())
    assert taken


def test_nothing_is_restored_that_nobody_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a job of SLURM, Lightning takes up what a folder holds under this name."""
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "hpc_ckpt_1.ckpt").write_text("no checkpoint")
    options = {"default_root_dir": tmp_path, "fast_dev_run": 1}
    _Trainer(**options).validate(BoringModel())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(Exception, match=r"invalid load key|Weights only load failed"):
        Trainer(accelerator="cpu", **quiet, **options).validate(BoringModel())


class _EveryBatch(CheckpointsOnDemand):
    """Asks to save after every batch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.save_last_now(trainer)


@pytest.mark.parametrize("after_training_epoch", [True, False])
def test_checkpoints_on_demand(after_training_epoch: bool, tmp_path: Path) -> None:
    saves: list[int] = []
    callback = _EveryBatch(tmp_path, save_last=True, save_on_train_epoch_end=after_training_epoch)
    trainer = _Trainer(limit_train_batches=3, limit_val_batches=0, callbacks=[callback])
    save = trainer.save_checkpoint

    def counted(path: Any, *options: Any) -> None:
        assert Path(path).name == "last.ckpt" or trainer.global_step == 3
        saves.append(trainer.global_step)
        save(path, *options)

    trainer.save_checkpoint = counted  # type: ignore[method-assign]
    trainer.fit(BoringModel())
    assert callback.saves_after_training_epoch(trainer) == after_training_epoch
    assert saves[:3] == [1, 2, 3]


def test_steps_that_are_logged(tmp_path: Path) -> None:
    trainer = _Trainer(limit_train_batches=3, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit_loop = trainer.fit_loop.state_dict()
    assert num_logged_steps(fit_loop) == 3
    set_num_logged_steps(trainer, 7)
    assert num_logged_steps(trainer.fit_loop.state_dict()) == 7


class _Run:
    exit_code: int | None = None

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *given, **options: None


def test_the_wandb_run_opens_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[dict[str, Any]] = []
    run = _Run()

    def init(**settings: Any) -> _Run:
        opened.append(settings)
        return run

    monkeypatch.setattr("wandb.init", init)
    logger = LateWandbLogger("p")
    logger.experiment.anything()
    assert (logger.open_run, opened) == (None, [])
    logger.describe_run(str(tmp_path), id="i")
    assert logger.save_dir == str(tmp_path)
    assert logger.experiment is run
    assert logger.experiment is logger.open_run
    (settings,) = opened
    assert {"dir": str(tmp_path), "id": "i", "project": "p"}.items() <= settings.items()
    assert "anonymous" not in settings
    logger.close_run(3)
    assert (run.exit_code, logger.open_run) == (3, None)


class _CLI(HookedCLI):
    settled: str | None = None

    def add_verb_arguments(self, parser: LightningArgumentParser, verb: str) -> None:
        parser.add_argument(f"--only_{verb}", type=int, default=0)

    def take_settings_of_checkpoint(self) -> None:
        self.settled = self.config.fit.ckpt_path
        self.config.fit.ckpt_path = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LearningRateFinder, "finder")

    def callbacks_of_run(
        self, named: Sequence[Callback], own: Sequence[Callback], has_logger: bool
    ) -> list[Callback]:
        self.asked = ([type(one) for one in named], [type(one) for one in own], has_logger)
        return list(named)


@pytest.mark.parametrize("name", ["callbacks", "callbacks+"])
def test_hooks_of_the_command_line(name: str) -> None:
    """The checkpoint is gone before the trainer looks for it; a callback may be named without a list."""
    trainer = ["--trainer.fast_dev_run", "true", "--trainer.enable_checkpointing", "false"]
    trainer += [f"--trainer.{name}", "LambdaCallback", "--trainer.logger", "false"]
    cli = _CLI(
        BoringModel,
        BoringDataModule,
        save_config_callback=None,
        trainer_class=HookedTrainer,
        args=["fit", "--only_fit", "3", "--ckpt_path", "c.ckpt", *trainer],
    )
    assert cli.config.fit.only_fit == 3
    assert cli.settled == "c.ckpt"
    assert cli.asked == ([LambdaCallback], [LearningRateFinder], False)
    callbacks = {type(one) for one in cli.trainer.callbacks}
    assert LambdaCallback in callbacks
    assert LearningRateFinder not in callbacks
    assert cli.trainer.global_step == 1
