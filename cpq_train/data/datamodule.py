"""The data of a run: how samples that train, calibrate and evaluate are loaded."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import Any

from torch.utils.data import DataLoader

from cpq_train.data.census import check_targets
from cpq_train.data.class_balance import class_balanced_rows
from cpq_train.data.cloud_files import CloudFiles
from cpq_train.data.data_set import NuScenesDataSet, Rows
from cpq_train.data.dataset import DetectionDataset, Item
from cpq_train.data.gt_database import open_gt_database
from cpq_train.data.gt_sampling import GtSampler
from cpq_train.data.position import EpochPosition
from cpq_train.data.sample_loader import sample_loader
from cpq_train.data.samplers import EvaluationSampler, TrainingSampler, dealt_batches


class NuScenesDataModule(NuScenesDataSet):
    """Samples of a data set as batches of voxels; `NuScenesDataSet` has the options."""

    _resumed: EpochPosition | None = None

    def setup(self, stage: str) -> None:
        """Before a fit starts, looks for what it needs.

        Raises:
            UserError: no annotation is a target; see `_gt_sampler`.
        """
        if stage == "fit":
            rows, of_points = self.selection.train_rows, self.settings.point_cloud_range
            check_targets(self.index, rows, self.class_names, of_points, self.splits.train)
            self._gt_sampler()

    def train_dataloader(self) -> DataLoader[Item]:
        """Augmented training samples, in an order and with draws of their own in every epoch."""
        rows = self._train_rows
        config = dataclasses.replace(
            self.evaluation_config,
            max_num_voxels=self.settings.max_num_voxels_train,
            augmentation=self._augmentation,
            is_training=True,
        )
        dataset = DetectionDataset(self.index, rows, config, self._gt_sampler())
        rank, world_size = self._place()
        sampler = TrainingSampler(dataset, num_replicas=world_size, rank=rank, seed=self.seed)
        if self._resumed is not None:  # its epoch too: workers load before Lightning tells the sampler
            self._resumed.check_order(self.batch_size * world_size, len(rows), self.seed)
            sampler.begin_at(self._resumed.epoch, self._resumed.num_batches * self.batch_size)
            self._resumed = None
        elif self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)
        return self._loader(dataset, batch_size=self.batch_size, sampler=sampler)

    @cached_property
    def _train_rows(self) -> Rows:
        """Index rows of an epoch's training samples; with class balance a row may occur several times."""
        rows = self.selection.train_rows
        if not self.class_balanced:
            return rows
        return class_balanced_rows(self.index, rows, self.seed, self.class_names)

    def _gt_sampler(self) -> GtSampler | None:
        """What fills training scenes up.

        Raises:
            UserError: there is no database, it holds no object to sample, or sampling is to fade out of a
                training of unknown length.
        """
        if self.gt_sampling is None:
            return None
        split, config = self.splits.train, self.evaluation_config
        skipped = self.selection.skipped(split)
        database = open_gt_database(
            self.index,
            split,
            config.num_sweeps,
            self.cache_dir,
            config.points,
            skipped,
            config.max_bad_sweeps,
        )
        max_epochs = None if self.trainer is None else self.trainer.max_epochs
        num_epochs = None if max_epochs == -1 else max_epochs
        return GtSampler(database, self.gt_sampling, self.class_names, num_epochs)

    def state_dict(self) -> dict[str, int]:
        """How far training has come in its epoch; Lightning keeps it in checkpoints."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        epochs = self.trainer.fit_loop.epoch_progress.current.state_dict()
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()
        position = EpochPosition(
            epoch=epochs["processed"],
            num_batches=batches["processed"] if epochs["started"] > epochs["processed"] else 0,
            samples_per_batch=self.batch_size * self.trainer.world_size,
            num_samples=len(self._train_rows),
            seed=self.seed,
        )
        return dataclasses.asdict(position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where `state_dict` was asked for; what was trained on is not loaded again."""
        self._resumed = EpochPosition(**state_dict)

    def val_dataloader(self) -> DataLoader[Item]:
        """This rank's share of the validation samples."""
        return self.evaluation_dataloader(*self._place())

    def test_dataloader(self) -> DataLoader[Item]:
        """This rank's share of the test split."""
        return self._evaluation_loader(self._samples(self.test_rows), *self._place())

    def predict_dataloader(self) -> DataLoader[Item]:
        """This rank's share of what is predicted on."""
        files = None if self.clouds is None else CloudFiles(self.clouds, self.evaluation_config)
        return self._evaluation_loader(files or self._samples(self.predict_rows), *self._place())

    def evaluation_dataloader(self, rank: int = 0, world_size: int = 1) -> DataLoader[Item]:
        """A rank's share of the validation samples: each sample on exactly one rank, without augmentation."""
        return self._evaluation_loader(self._samples(self.eval_rows), rank, world_size)

    def _samples(self, rows: Rows) -> DetectionDataset:
        return DetectionDataset(self.index, rows, self.evaluation_config)

    def calibration_dataloader(self) -> DataLoader[Item]:
        """This rank's batches of the calibration samples, without augmentation.

        Raises:
            UserError: see `calibration_rows`.
        """
        rows = self.calibration_rows
        dataset = DetectionDataset(self.index, rows, self.evaluation_config)
        batches = dealt_batches(len(rows), self.batch_size, *self._place())
        return self._loader(dataset, batch_sampler=batches)

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks; without a trainer there is one."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _evaluation_loader(
        self, dataset: DetectionDataset | CloudFiles, rank: int, world_size: int
    ) -> DataLoader[Item]:
        sampler = EvaluationSampler(dataset, rank, world_size)
        report = partial(setattr, self, "num_bad_sweeps")
        return self._loader(dataset, batch_size=self.batch_size, sampler=sampler, report=report)

    def _loader(self, dataset: DetectionDataset | CloudFiles, **order: Any) -> DataLoader[Item]:
        return sample_loader(dataset, self.num_workers, **order)
