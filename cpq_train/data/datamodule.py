"""The data of a run: which samples train, calibrate and evaluate, and how they are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from cpq_train.common.detection_task import DetectionClass, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES, LIDAR_TOP
from cpq_train.data.augmentation import Augmentation
from cpq_train.data.census import check_targets
from cpq_train.data.class_balance import class_balanced_rows
from cpq_train.data.cloud_files import CloudFiles
from cpq_train.data.dataset import DetectionDataset, Item, SampleConfig
from cpq_train.data.gt_database import open_gt_database
from cpq_train.data.gt_sampling import GtSampler, GtSampling
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.point_checks import check_files
from cpq_train.data.position import EpochPosition
from cpq_train.data.sample_loader import sample_loader
from cpq_train.data.samplers import EvaluationSampler, TrainingSampler, dealt_batches
from cpq_train.data.selection import Limits, Selection, SplitNames
from cpq_train.data.settings import DataSettings, as_tuple
from cpq_train.data.splits import UNION

Rows = NDArray[np.int64]


class NuScenesDataModule(LightningDataModule):
    """Samples of a data set in the nuScenes format as batches of voxels.

    Args:
        root: the data root, the folder that holds `samples/`, `sweeps/` and the version's folder of tables;
            null only where bare cloud files are predicted on.
        version: name of the folder of tables, such as v1.0-trainval or v1.0-mini.
        num_sweeps: LiDAR sweeps per sample, 1 (the key frame alone) to 10.
        voxel_size: x, y, z in metres.
        point_cloud_range: minimum x, y, z and maximum x, y, z in metres, in the LiDAR frame.
        class_names: the network's classes, in the order of labels; objects of others are no targets.
        classes: the data set's own classes by name, each with its categories and the rules of its score; null
            for nuScenes' ten. The network's classes are among them.
        lidar_channel: name of the LiDAR in table `sensor`.
        max_points_per_voxel: further points of a voxel are dropped.
        max_num_voxels_train: further voxels of a training sample are dropped.
        max_num_voxels_eval: further voxels of a sample that is evaluated or calibrated with are dropped.
        point_columns: of the cloud files: name or name:dtype. The network sees x, y, z, then others but ring
            and those that begin with _, then a time lag.
        intensity_scale: what intensities are multiplied by; the network expects 0 to 255.
        drop_nonfinite_points: leave points with NaN or infinite values out, instead of failing.
        max_bad_sweeps: share of an epoch's sweeps that may be missing or damaged; each is left out and named.
        batch_size: samples per rank and step.
        num_workers: loading processes per rank and loader; 0 loads in the main process.
        seed: of the order of samples, the augmentation and the choice of calibration samples.
        train_split: split to train on, an official one ("train" is mini_train in a mini version) or one that
            `splits.json` in the folder of tables names.
        train_splits: several splits to train on instead, such as train and val for a last training.
        val_split: split to validate on; "val" is mini_val in a mini version.
        test_split: split that the test and predict verbs run on.
        missing_scenes: error, or skip to leave out scenes of which clouds are missing, as in a root that is
            downloaded in part; those of a scored split are named in metrics.json.
        sample_tokens: evaluate these samples only; all of them must belong to the split.
        augmentation: what is drawn anew for each training sample; null for none.
        gt_sampling: objects of other samples that training scenes are filled up with, from the database
            that build-gt-database makes; null for none.
        class_balanced: train on samples drawn so that each class comes up equally often (CBGS); drawn once,
            by the seed. An epoch is then several times as long.
        num_calibration_samples: samples that quantizers are calibrated with; each scene gives equally many,
            up to one.
        calibration_split: split to calibrate on; null for `train_split`.
        force_calibration_on_val: calibrate on samples of `val_split` too, which makes its scores too good.
        force_score_on_train: score samples that `train_splits` hold, likewise.
        cache_dir: where the index is kept; null for the data root, or the user's cache if that is read-only.
    """

    def __init__(
        self,
        root: str | None = None,
        version: str = "v1.0-trainval",
        num_sweeps: int = DataSettings.num_sweeps,
        voxel_size: tuple[float, float, float] = DataSettings.voxel_size,
        point_cloud_range: tuple[float, float, float, float, float, float] = DataSettings.point_cloud_range,
        class_names: tuple[str, ...] = DETECTION_CLASSES,
        classes: dict[str, DetectionClass] | None = None,
        lidar_channel: str = LIDAR_TOP,
        max_points_per_voxel: int = DataSettings.max_points_per_voxel,
        max_num_voxels_train: int = DataSettings.max_num_voxels_train,
        max_num_voxels_eval: int = DataSettings.max_num_voxels_eval,
        point_columns: tuple[str, ...] = DataSettings.point_columns,
        intensity_scale: float = DataSettings.intensity_scale,
        drop_nonfinite_points: bool = False,
        max_bad_sweeps: float = 0.0,
        batch_size: int = 4,
        num_workers: int = 4,
        seed: int = 0,
        train_split: str = "train",
        train_splits: list[str] | None = None,
        val_split: str = "val",
        test_split: str = "test",
        missing_scenes: Literal["error", "skip"] = "error",
        sample_tokens: list[str] | None = None,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008 - frozen, and shown in the command's help
        gt_sampling: GtSampling | None = None,
        class_balanced: bool = False,
        num_calibration_samples: int = 256,
        calibration_split: str | None = None,
        force_calibration_on_val: bool = False,
        force_score_on_train: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"data.{name} is {value}: expected {least} or more")
        self.task, self.lidar_channel = DetectionTask.of(classes), lidar_channel
        self.task.ids(class_names)  # refuses foreign ones
        self.class_names = tuple(class_names)
        self.root, self.version, self.cache_dir = root, version, cache_dir
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.splits = SplitNames(
            UNION.join(train_splits or [train_split]), val_split, test_split, calibration_split or train_split
        )
        self._limits = Limits(sample_tokens, missing_scenes, force_calibration_on_val, force_score_on_train)
        self.num_calibration_samples = num_calibration_samples
        self.settings = DataSettings(**{name: as_tuple(options[name]) for name in DataSettings().to_dict()})
        config = SampleConfig.of_evaluation(self.settings, self.class_names, seed, drop_nonfinite_points)
        self.evaluation_config = dataclasses.replace(config, max_bad_sweeps=max_bad_sweeps)
        self._augmentation, self.gt_sampling, self.class_balanced = augmentation, gt_sampling, class_balanced
        self._index: NuScenesIndex | None = None
        self.clouds: list[Path] | None = None
        """Files to predict on instead of samples, set by whoever predicts; see `CloudFiles`."""
        self._resumed: EpochPosition | None = None
        self.num_bad_sweeps = 0
        """Clouds that this rank's last evaluation left out."""

    @cached_property
    def selection(self) -> Selection:
        """Which samples are for what."""
        return Selection(self.index, self.splits, self._limits, self.settings.num_sweeps)

    def prepare_data(self) -> None:
        """Builds the index, once per node."""
        if self.clouds is None:
            self._open_index()

    def setup(self, stage: str) -> None:
        """Before a fit starts, looks for what it needs.

        Raises:
            UserError: no annotation is a target; see `_gt_sampler`.
        """
        if stage == "fit":
            rows, of_points = self.selection.train_rows, self.settings.point_cloud_range
            check_targets(self.index, rows, self.class_names, of_points, self.splits.train)
            self._gt_sampler()

    @property
    def index(self) -> NuScenesIndex:
        """The index of the data set.

        Raises:
            UserError: the root, the version or a table is missing or damaged.
            CloudError: one of a few clouds is not of `point_columns`.
        """
        if self._index is None:
            self._index = self._open_index()
        return self._index

    def _open_index(self) -> NuScenesIndex:
        if self.root is None:
            raise UserError("data.root is not given: expected the folder that holds samples/ and the tables")
        index = open_index(self.root, self.version, self.cache_dir, self.task, self.lidar_channel)
        check_files(index, self.evaluation_config.points, self.evaluation_config.skips_bad_sweeps)
        return index

    @property
    def eval_rows(self) -> Rows:
        """Index rows (S,) of the samples that are validated on, over all ranks."""
        return self.selection.val_rows

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
        num_sweeps, points = self.settings.num_sweeps, self.evaluation_config.points
        database = open_gt_database(self.index, self.splits.train, num_sweeps, self.cache_dir, points)
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

    @property
    def test_rows(self) -> Rows:
        """Index rows (S,) of the samples of the test split, over all ranks."""
        return self.selection.test_rows

    def test_dataloader(self) -> DataLoader[Item]:
        """This rank's share of the test split."""
        return self._evaluation_loader(self._samples(self.test_rows), *self._place())

    @property
    def predict_rows(self) -> Rows:
        """Index rows (S,) of `sample_tokens`, of whatever split; without any, of the test split.

        Where `clouds` are predicted on, the positions of the files.
        """
        if self.clouds is not None:
            return np.arange(len(self.clouds))
        return self.selection.predict_rows

    def predict_dataloader(self) -> DataLoader[Item]:
        """This rank's share of what is predicted on."""
        files = None if self.clouds is None else CloudFiles(self.clouds, self.evaluation_config)
        return self._evaluation_loader(files or self._samples(self.predict_rows), *self._place())

    def evaluation_dataloader(self, rank: int = 0, world_size: int = 1) -> DataLoader[Item]:
        """A rank's share of the validation samples: each sample on exactly one rank, without augmentation."""
        return self._evaluation_loader(self._samples(self.eval_rows), rank, world_size)

    def _samples(self, rows: Rows) -> DetectionDataset:
        return DetectionDataset(self.index, rows, self.evaluation_config)

    @property
    def calibration_rows(self) -> Rows:
        """Index rows (N,) of the `num_calibration_samples` samples to calibrate with, over all ranks.

        Raises:
            UserError: see `Selection.calibration_rows`.
        """
        return self.selection.calibration_rows(self.num_calibration_samples, self.seed)

    def calibration_dataloader(self) -> DataLoader[Item]:
        """This rank's batches of the calibration samples, without augmentation.

        Raises:
            UserError: see `calibration_rows`.
        """
        rows = self.calibration_rows
        dataset = DetectionDataset(self.index, rows, self.evaluation_config)
        batches = dealt_batches(len(rows), self.batch_size, *self._place())
        return self._loader(dataset, batch_sampler=batches)

    def calibration_info(self) -> dict[str, Any]:
        """What a checkpoint says of the samples it was calibrated with."""
        tokens = sorted(self.index.sample_token(row) for row in self.calibration_rows)
        return {
            "num_samples": len(tokens),
            "split": self.splits.calibration,
            "dataset": self.index.dataset_info(),
            "seed": self.seed,
            "tokens_sha256": hashlib.sha256("\n".join(tokens).encode()).hexdigest(),
        }

    def scored_info(self) -> dict[str, Any]:
        """What `metrics.json` says of the data set: which, and what of the scored split was left out."""
        skipped = self.selection.skipped_scenes
        return {**self.index.dataset_info(), **({"skipped_scenes": skipped} if skipped else {})}

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
