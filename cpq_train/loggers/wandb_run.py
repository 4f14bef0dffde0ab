"""The run of an arm as a W&B run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole
from cpq_train.common.lightning_private import LateWandbLogger
from cpq_train.common.wandb_private import end_connection
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.loggers import artifacts
from cpq_train.training.detector import CenterPointDetector

STEP = "trainer/global_step"
BEST = ("val/NDS", "val/mAP")
"""Metrics whose summary has the best value beside the last."""


class WandbRunLogger(LateWandbLogger):
    """One W&B run per run directory and arm, however often the job is requeued.

    Its group is the experiment, its job type the arm, its name `<group>-<arm>`. Metrics are plotted against
    `trainer/global_step`. It says which checkpoint it started from and which it made, so that W&B shows how
    QAT, PTQ and float descend. `WANDB_MODE=offline` logs to the run directory, for `wandb sync`.

    Args:
        project: W&B project; null is the environment's `WANDB_PROJECT`, or cpq_train.
        group: The experiment that the arms belong to; null is the folder that holds the run directory.
        tags: Tags beside the version of the data and the name of the scheme.
        log_model: Whether checkpoints go along: the best and the last one, and those they came from.

    Attributes:
        run_dir: The run directory; the command line sets it.
        run_config: Settings of the run, logged once; the command line sets it.
    """

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        log_model: bool = True,
    ) -> None:
        super().__init__(project=project or os.environ.get("WANDB_PROJECT", "cpq_train"))
        self.run_dir = Path()
        self.run_config: Mapping[str, Any] = {}
        self._group, self._tags, self._takes_checkpoints = group, tags, log_model
        self._trainer: Trainer | None = None
        self._scored_step: int | None = None

    @rank_zero_only
    def start(self, trainer: Trainer, module: CenterPointDetector, data: NuScenesDataModule) -> None:
        """Open the run, or go on with it, once the network is what it will be.

        Raises:
            UserError: W&B has no login, or cannot be reached.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        group = self._group or self.run_dir.resolve().parent.name
        settings = arm_settings(module)
        scheme = [] if settings["scheme"] is None else [settings["scheme"]]
        self.describe_run(
            str(self.run_dir),
            id=run_id(self.run_dir, module.row),
            name=f"{group}-{module.row}",
            group=group,
            job_type=module.row,
            tags=[*self._tags, data.version, *scheme],
            config={**settings, **self.run_config},
            allow_val_change=True,
        )
        self._trainer = trainer
        self._open()
        if trainer.state.fn == "validate" and module.engine is None:
            num_steps = int(read_checkpoint(trainer.ckpt_path or str(module.weights))["global_step"])
            self._scored_step = max(num_steps - 1, 0)  # a fit logs at the number of its last step, from 0 on
        self._log_inputs(trainer, module)

    def _open(self) -> None:
        import wandb

        try:
            for name in BEST:
                self.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary="max,last")
        except wandb.Error as error:
            raise UserError(
                f"trainer.logger: W&B opens no run ({error}); accepted: a login (`wandb login` or "
                "WANDB_API_KEY), or WANDB_MODE=offline"
            ) from error

    def _log_inputs(self, trainer: Trainer, module: CenterPointDetector) -> None:
        if self._takes_checkpoints:
            for path in artifacts.inputs(trainer, module, self.run_dir):
                artifacts.use(self.experiment, artifacts.checkpoint_artifact(path))

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log at a step; what `validate` finds belongs to the step of the checkpoint that it scores."""
        with self._outliving_wandb():
            super().log_metrics(metrics, step if self._scored_step is None else self._scored_step)

    @rank_zero_only
    def log_checkpoint(
        self, path: Path, aliases: Sequence[str], scores: Mapping[str, float] | None = None
    ) -> None:
        """Log a checkpoint that the run made."""
        if self._takes_checkpoints:
            artifact = artifacts.checkpoint_artifact(path, scores)
            with self._outliving_wandb():
                self.experiment.log_artifact(artifact, aliases=list(aliases))

    @rank_zero_only
    def mark_preempting(self) -> None:
        """Have W&B show the run as preempted, not as failed, until it goes on."""
        if self.open_run is not None:
            with self._outliving_wandb():
                self.open_run.mark_preempting()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run; the same run directory goes on with it."""
        if self.open_run is None:
            return
        assert self._trainer is not None
        if status == "success" and self._trainer.state.fn == "fit":
            for path, (aliases, scores) in artifacts.outputs(self._trainer).items():
                self.log_checkpoint(path, aliases, scores)
        with self._outliving_wandb():
            if self.open_run is not None:
                self.close_run(exit_code=0 if status == "success" else 1)

    @contextmanager
    def _outliving_wandb(self) -> Iterator[None]:
        """Go on without W&B where its process is gone: SLURM's SIGTERM ends every process of a job."""
        try:
            yield
        except ConnectionError as error:
            self.abandon_run()
            end_connection()
            rank_zero_warn(
                f"W&B's process is gone ({error}): nothing is logged there until the run is started again"
            )


def run_id(run_dir: Path, arm: str) -> str:
    """The id that a run directory keeps for an arm; made at the first call.

    It is no hash of the path: two machines often have a folder of the same name, and a folder may be moved.
    """
    file = run_dir / "wandb" / f"{arm}.id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, secrets.token_hex(4))
    return file.read_text()


def arm_settings(module: CenterPointDetector) -> dict[str, Any]:
    """What the configuration in W&B says of a run; bits are those of the scheme's defaults."""
    if module.engine is not None:
        said = module.engine.sidecar
        return {
            "arm": module.row,
            "scheme": said.scheme["name"],
            "parents": said.parents,
            "engine": module.engine.describe(),
        }
    subject = module.subject
    scheme = subject.scheme
    both = {} if scheme is None else {"weight": scheme.defaults.weight, "input": scheme.defaults.input}
    return {
        "arm": subject.arm,
        "scheme": None if scheme is None else scheme.name,
        "bits": {name: None if q.is_off else q.bits for name, q in both.items()},
        "batchnorm": subject.batchnorm,
        "parents": dict(subject.parents),
    }
