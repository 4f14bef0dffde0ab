"""LightningCLI over the detector and the nuScenes data module."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from cpq_train.callbacks.amax_drift import AmaxDrift
from cpq_train.callbacks.baselines import Baselines
from cpq_train.callbacks.checkpoints import RunCheckpoints
from cpq_train.callbacks.evaluation import Evaluation
from cpq_train.callbacks.layer_latency import LayerLatency
from cpq_train.callbacks.layer_memory import LayerMemory
from cpq_train.callbacks.predictions import WritePredictions
from cpq_train.callbacks.progress import ProgressLines
from cpq_train.callbacks.resume_point import ResumePoint
from cpq_train.callbacks.throughput import Throughput
from cpq_train.callbacks.watchdog import Watchdog
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.documents import parse_yaml
from cpq_train.common.errors import OptionError, UserError
from cpq_train.common.files import check_writable, write_whole
from cpq_train.common.lightning_private import HookedCLI
from cpq_train.common.memory import keep_freed_memory
from cpq_train.common.progress import draws_bars
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.loggers import CSVRunLogger, StartLoggers, WandbRunLogger
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.settings import HYPER_PARAMETERS, hyper_parameters, settings_of
from cpq_train.verbs.checkpoint_settings import (
    find_scheme,
    follow_features,
    keep_what_was_asked,
    leave_out_parts,
    leave_to_engine,
    take_data_settings,
)
from cpq_train.verbs.fit_checks import check_fit
from cpq_train.verbs.following import follow_classes
from cpq_train.verbs.given import Given
from cpq_train.verbs.parsing import VerbParser
from cpq_train.verbs.trainer import QuantTrainer

WEIGHTS_OF_VERB = {
    "calibrate": "starts from model.weights, a float checkpoint",
    "sensitivity": "starts from model.weights, a float checkpoint",
    "profile": "takes its network from model.weights or a list of checkpoints",
}


VERBS_OF_ENGINES = ("validate", "test", "predict")
"""Verbs that run a deployment file in the network's place."""

NO_FILES = ("best", "hpc", "registry")
"""Values of `--ckpt_path` that mean something to Lightning, and nothing here."""

ARRAY_TASK = "{SLURM_ARRAY_TASK_ID}"
"""In `trainer.default_root_dir`: tasks of an array have the same command line, and each needs its folder."""

MOVED_MODULES = {"cpq_train.strategy": "cpq_train.training.strategy"}
"""Where modules went whose classes a saved config.yaml may name by their path."""


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run directory: a fit always, other verbs where there is none.

    A fit writes it when its checkpoint is loaded and not before, so that one that is refused leaves the
    folder of a run as it was.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See Callback."""
        if stage != "fit":
            if trainer.is_global_zero:
                check_writable(Path(trainer.default_root_dir), "trainer.default_root_dir")
            super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See SaveConfigCallback; called on rank 0."""
        path = Path(trainer.default_root_dir) / self.config_filename
        if stage == "fit" or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config.ckpt_path = None  # how this command went on is no setting of the run
            write_whole(path, self.parser.dump(config, skip_none=False))


class LightningParser(VerbParser, LightningArgumentParser):
    """A parser for LightningCLI that says mistakes as `VerbParser` does."""


class QuantCLI(HookedCLI):
    """The verbs that run a network."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verb -> the arguments that the CLI itself provides."""
        theirs = LightningCLI.subcommands()
        ours = {verb: {"model", "datamodule"} for verb in WEIGHTS_OF_VERB}
        ours["profile"].add("checkpoints")
        return {**theirs, "predict": theirs["predict"] | {"return_predictions"}, **ours}

    @override
    def add_verb_arguments(self, parser: LightningArgumentParser, verb: str) -> None:
        """Lists of files, and what a fit's configuration holds that our own verbs do not have."""
        if verb == "predict":
            # By itself jsonargparse would take a list in brackets only.
            parser.add_argument(
                "--clouds",
                nargs="+",
                type=Path,
                help="files of data.point_columns, a sweep each, instead of samples of data.root",
            )
        if verb == "profile":
            parser.add_argument(
                "checkpoints",
                nargs="*",
                type=Path,
                help="checkpoints to time in turn, side by side in this order, instead of model.weights",
            )
        if verb in WEIGHTS_OF_VERB:
            parser.add_argument("--ckpt_path", type=str | None, help=argparse.SUPPRESS)
            parser.add_argument("--weights_only", type=bool | None, help=argparse.SUPPRESS)

    def before_fit(self) -> None:
        """Look for what would fail late."""
        assert isinstance(self.datamodule, NuScenesDataModule)
        check_fit(self.trainer, self.model, self.datamodule)

    def predict(self, model: LightningModule, **arguments: Any) -> None:
        """Predict without keeping in memory what is written."""
        assert isinstance(self.datamodule, NuScenesDataModule)
        self.datamodule.clouds = self.config_init["predict"]["clouds"]
        self.trainer.predict(model, return_predictions=False, **arguments)

    def profile(self, model: LightningModule, **arguments: Any) -> None:
        """Profile the checkpoints that the command line names, if it names any."""
        assert isinstance(self.trainer, QuantTrainer)
        checkpoints = self.config_init["profile"]["checkpoints"] or ()
        self.trainer.profile(model, checkpoints=checkpoints, **arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks every run has, and what the data shares with the network."""
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(Baselines, "baselines")
        parser.add_lightning_class_args(WritePredictions, "predictions")
        parser.add_lightning_class_args(RunCheckpoints, "checkpoint")
        parser.add_lightning_class_args(ResumePoint, "resume")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(AmaxDrift, "amax_drift")
        parser.add_lightning_class_args(LayerLatency, "layer_latency")
        parser.add_lightning_class_args(LayerMemory, "layer_memory")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(ProgressLines, "progress")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/default",
                "checkpoint.filename": "epoch{epoch:02d}-NDS{val/NDS:.3f}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.monitor": "val/NDS",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,  # a resumed run writes its files again
            }
        )
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=_checkpoint_dir)
        for name in ("voxel_size", "point_cloud_range", "class_names"):
            parser.link_arguments(f"model.network.{name}", f"data.{name}")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Remember what was given, and is no default."""
        super().parse_arguments(parser, args)
        files = [Path(str(file)) for file in self.config[self.config.subcommand].config or ()]
        self.given = Given(sys.argv[1:] if args is None else args, files)

    @override
    def take_settings_of_checkpoint(self) -> None:
        """As LightningCLI has it, but the command line counts where a run goes on with `last`."""
        verb = self.config.subcommand
        self._settle_run_folder(self.config[verb])
        asked = self.config[verb].clone()
        if verb in WEIGHTS_OF_VERB:
            if asked.ckpt_path is not None and self.given.on_command_line("ckpt_path"):
                raise UserError(f"{verb} {WEIGHTS_OF_VERB[verb]}, not from --ckpt_path")
            self.config[verb].ckpt_path = None
        elif asked.ckpt_path in NO_FILES:
            raise UserError(
                f"ckpt_path is {asked.ckpt_path!r}; accepted: a checkpoint file, or last, the newest of "
                "trainer.default_root_dir"
            )
        elif asked.ckpt_path not in (None, "last"):
            self._take_hyper_parameters(verb, asked.ckpt_path)
        config = self.config[verb]
        if verb == "fit":
            keep_what_was_asked(config, asked, self.given)
        if verb in VERBS_OF_ENGINES:
            leave_to_engine(config, self.given)
        find_scheme(config, self.given)
        sentences = leave_out_parts(config, self.given) + follow_classes(config, self.given)
        for sentence in sentences + take_data_settings(config, self.given):
            rank_zero_warn(sentence)
        follow_features(config, self.given)

    def _take_hyper_parameters(self, verb: str, path: str) -> None:
        """Complete the model's settings by those of a checkpoint: data, which name nothing to import."""
        content = read_checkpoint(path, mmap=True)
        settings_of(content, path, CenterPointDetector)
        stated = {verb: {"model": hyper_parameters(content, path)}}
        try:
            self.config = self.parser.parse_object(stated, self.config)
        except OptionError as error:
            raise UserError(f"checkpoint {path!r}, {HYPER_PARAMETERS}: {error}") from error

    @override
    def callbacks_of_run(
        self, named: Sequence[Callback], own: Sequence[Callback], has_logger: bool
    ) -> list[Callback]:
        """Those named, and our own; of the classes of our own one each, the last that is named.

        The resume point is the first of all: what a step was saved with is put back before anything is done.
        """
        own = [*([StartLoggers(), LearningRateMonitor("step")] if has_logger else []), *own]
        last_named = {type(callback): callback for callback in named}
        kinds = {type(callback) for callback in own}
        kept = [one for one in named if type(one) not in kinds or one is last_named[type(one)]]
        chosen = [*kept, *(one for one in own if type(one) not in last_named)]
        return sorted(chosen, key=lambda one: not isinstance(one, ResumePoint))

    def _settle_run_folder(self, config: Namespace) -> None:
        """Fill in the number of an array's task; what a trial run writes goes when it ends."""
        trainer = config.trainer
        trainer.default_root_dir = _of_this_task(str(trainer.default_root_dir))
        if ARRAY_TASK in trainer.default_root_dir:
            raise UserError(
                f"trainer.default_root_dir is {trainer.default_root_dir!r}, and this is no task of an array; "
                "accepted: a folder without the number, or a job that sbatch --array started"
            )
        if trainer.fast_dev_run:
            self._scratch = TemporaryDirectory(prefix="fast_dev_run_")
            trainer.default_root_dir = self._scratch.name
            config.checkpoint.dirpath = _checkpoint_dir(self._scratch.name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """What the configuration leaves open.

        Without a logger a fit logs to `metrics.csv`; none costs nothing. A bar is drawn on a terminal, which
        `ProgressLines` take the place of elsewhere.
        """
        config = self.config_init[self.subcommand].trainer
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.enable_progress_bar is None and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["enable_progress_bar"] = draws_bars()
        if config.logger is None:
            kwargs["logger"] = CSVRunLogger() if self.subcommand == "fit" else False
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.accelerator, CPUAccelerator):  # arrays of a GPU are not in it
            keep_freed_memory()
        for logger in trainer.loggers:
            if isinstance(logger, CSVRunLogger | WandbRunLogger):
                logger.run_dir = Path(trainer.default_root_dir)
            if isinstance(logger, WandbRunLogger):
                settings = self.parser.dump(self.config, skip_none=False)
                logger.run_config = parse_yaml(settings, "configuration")[self.subcommand]
        return trainer


def _of_this_task(folder: str) -> str:
    return folder.replace(ARRAY_TASK, os.environ.get(ARRAY_TASK[1:-1], ARRAY_TASK))


def _checkpoint_dir(default_root_dir: str) -> str:
    return str(Path(_of_this_task(default_root_dir)) / "checkpoints")


def run(args: list[str]) -> None:
    """Parse the arguments and run the verb.

    Raises:
        UserError: What the user gave does not work out.
    """
    for old, new in MOVED_MODULES.items():
        sys.modules.setdefault(old, import_module(new))
    QuantCLI(
        CenterPointDetector,
        NuScenesDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_class=QuantTrainer,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=None if args == sys.argv[1:] else args,  # LightningCLI warns of arguments that are handed over
        parser_class=LightningParser,
        parser_kwargs={"prog": "cpq_train"},
    )
