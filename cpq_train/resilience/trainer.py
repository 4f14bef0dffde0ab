"""A Trainer whose fit outlives a cluster's faults."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.common.files import remove_partial
from cpq_train.common.lightning_private import HookedTrainer
from cpq_train.evaluation.run_files import METRICS_FILE
from cpq_train.resilience.checkpoint_io import AtomicCheckpointIO
from cpq_train.resilience.preemption import Preempted, Request, noting_signals, requeue
from cpq_train.resilience.resume import RESUME_FILE, checkpoint_folder, newest_checkpoint


class ResilientTrainer(HookedTrainer):
    """Lightning's Trainer with atomic checkpoints, orderly preemption and `--ckpt_path last`.

    Attributes:
        continues_run: Whether the present fit goes on from the newest checkpoint of its own folder.
    """

    continues_run = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strategy.checkpoint_io = AtomicCheckpointIO()

    @override
    def handles_signals(self) -> bool:
        """A fit leaves its signals to `noting_signals`.

        Lightning's handlers save, and talk to other ranks, in the midst of whatever a signal interrupts,
        where the run may hang or the file tear (lightning issue 21406).
        """
        return self.state.fn != "fit"

    @override
    def fit(
        self,
        model: LightningModule,
        train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train, and validate along the way.

        Args:
            model: The detector.
            train_dataloaders: Loader of training batches, where no data module gives it.
            val_dataloaders: Loader of validation batches, where no data module gives it.
            datamodule: Gives the samples.
            ckpt_path: Checkpoint to resume; `last` is the newest good one in the run's folder, and a fresh
                start where there is none.
            weights_only: Admit tensors and plain values in the checkpoint only; null is torch's default,
                which does.

        Raises:
            Preempted: The run was asked to stop; it is saved.
            UserError: What was given does not work out, a loss is not finite, the disk is full, or a process
                that loads data died.
        """
        try:
            with noting_signals(), _naming_dead_workers():
                super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        except Preempted as stop:  # by now the loggers are closed: SLURM may end the job at once
            if stop.request is Request.REQUEUE and self.is_global_zero and requeue():
                stop.code = 0
            raise

    @override
    def resumed_checkpoint(self, model: LightningModule, ckpt_path: str | Path | None) -> str | Path | None:
        """What `last` means is rank 0's choice, which all ranks follow."""
        self.continues_run = ckpt_path == "last"
        if self.continues_run:
            self.strategy.connect(model)
            self.strategy.setup_environment()
            # Lightning looks at the loader alone; here the data module knows the place in the epoch.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
            newest = self._newest_checkpoint() if self.is_global_zero else None
            return self.strategy.broadcast(newest)
        if self.is_global_zero and ckpt_path is None and (checkpoint_folder(self) / RESUME_FILE).exists():
            rank_zero_warn(
                f"{str(checkpoint_folder(self))!r} holds an earlier run, whose files are now replaced; "
                "--ckpt_path last would go on with it"
            )
        return ckpt_path

    def _newest_checkpoint(self) -> str | None:
        """What `--ckpt_path last` means; also clears away what killed writers left."""
        run, checkpoints = Path(self.default_root_dir), checkpoint_folder(self)
        for folder in (run, checkpoints):
            remove_partial(folder)
        is_scored = (run / METRICS_FILE).exists()
        last_epoch = None if is_scored or self.max_epochs is None else self.max_epochs - 1
        newest = newest_checkpoint(checkpoints, last_epoch)
        rank_zero_info(
            f"--ckpt_path last: no checkpoint in {str(checkpoints)!r}, starting afresh"
            if newest is None
            else f"--ckpt_path last: going on from {str(newest)!r}"
        )
        return None if newest is None else str(newest)


@contextmanager
def _naming_dead_workers() -> Iterator[None]:
    """Say what to do where a process that loads data died."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"a process that loads data died: {error}. Often the memory of the machine or /dev/shm is full: "
            "lower data.num_workers or data.batch_size; --ckpt_path last goes on from the last checkpoint"
        ) from error
