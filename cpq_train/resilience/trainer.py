"""A Trainer whose fit outlives a cluster's faults."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from typing_extensions import override

from cpq_train.common.child_processes import end_with_parent
from cpq_train.common.errors import UserError
from cpq_train.common.files import remove_partial
from cpq_train.common.lightning_private import HookedTrainer
from cpq_train.common.signals import raising_signals
from cpq_train.evaluation.run_files import METRICS_FILE
from cpq_train.resilience.checkpoint_io import AtomicCheckpointIO
from cpq_train.resilience.claim import Claim, claimed
from cpq_train.resilience.resume import RESUME_FILE, checkpoint_folder, newest_checkpoint


class ResilientTrainer(HookedTrainer):
    """Lightning's Trainer with atomic checkpoints, orderly preemption and `--ckpt_path last`.

    Attributes:
        continues_run: Whether the present fit goes on from the newest checkpoint of its own folder.
    """

    continues_run = False
    _claim: Claim | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strategy.checkpoint_io = AtomicCheckpointIO()
        if is_started_by_rank_0(self):
            end_with_parent()  # a rank 0 that is killed has no chance to end it too

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
            Stopped: The run was asked to stop; once it trains it is saved.
            UserError: What was given does not work out, another fit has the run folder, a loss is not finite,
                or the disk is full.
        """
        with raising_signals(), self._having_its_folder():
            super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    @contextmanager
    def _having_its_folder(self) -> Iterator[None]:
        """Keep other fits out of the run folder, where this one writes to it."""
        if not self.is_global_zero:
            yield
            return
        try:
            with claimed(Path(self.default_root_dir)) as self._claim:
                yield
        finally:
            self._claim = None

    @override
    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """See Trainer.

        Raises:
            UserError: Another fit has taken the run folder.
        """
        if self._claim is not None:
            self._claim.check()
        super().save_checkpoint(filepath, weights_only, storage_options)

    @override
    def resumed_checkpoint(self, model: LightningModule, ckpt_path: str | Path | None) -> str | Path | None:
        """What `last` means is rank 0's choice, which all ranks follow.

        Raises:
            UserError: There is none to validate, test or predict with.
        """
        is_fit = self.state.fn == TrainerFn.FITTING
        self.continues_run = is_fit and ckpt_path == "last"
        if ckpt_path == "last":
            return self._last_checkpoint(model, is_fit)
        is_earlier = is_fit and ckpt_path is None and (checkpoint_folder(self) / RESUME_FILE).exists()
        if self.is_global_zero and is_earlier:
            rank_zero_warn(
                f"{str(checkpoint_folder(self))!r} holds an earlier run, whose files are now replaced; "
                "--ckpt_path last would go on with it"
            )
        return ckpt_path

    def _last_checkpoint(self, model: LightningModule, is_fit: bool) -> str | None:
        self.strategy.connect(model)
        self.strategy.setup_environment()
        # Lightning looks at the loader alone; here the data module knows the place in the epoch.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        found: str | None = None
        if self.is_global_zero:
            found = (
                self._newest_checkpoint() if is_fit else _name_of(newest_checkpoint(checkpoint_folder(self)))
            )
        found = self.strategy.broadcast(found)
        if found is None and not is_fit:
            raise UserError(f"ckpt_path is 'last': no checkpoint in {str(checkpoint_folder(self))!r}")
        return found

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
        return _name_of(newest)


def _name_of(file: Path | None) -> str | None:
    return None if file is None else str(file)


def is_started_by_rank_0(trainer: Trainer) -> bool:
    """Whether Lightning's own launcher started this process, as a child of rank 0 of its node."""
    environment = getattr(trainer.strategy, "cluster_environment", None)  # one device has none
    return isinstance(environment, LightningEnvironment) and trainer.local_rank != 0
