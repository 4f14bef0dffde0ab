"""A data set as it is configured: what is read of it, and which of its samples are for what."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from cpq_train.common.detection_task import NUSCENES, DetectionClass, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES, LIDAR_TOP
from cpq_train.common.progress import say
from cpq_train.data.augmentation import Augmentation
from cpq_train.data.dataset import SampleConfig
from cpq_train.data.gt_sampling import GtSampling
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.points.checks import check_files
from cpq_train.data.selection import DEFAULT_TRAIN_SPLIT, Limits, MissingScenes, Selection, SplitNames
from cpq_train.data.settings import CLASSES_KEY, DataSettings

Rows = NDArray[np.int64]


class NuScenesDataSet(LightningDataModule):
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
        max_bad_sweeps: share of the sweeps of a rank's epoch that may be missing or damaged; each is left out
            and named.
        batch_size: samples per rank and step.
        num_workers: loading processes per rank and loader; 0 loads in the main process.
        seed: of the order of samples, the augmentation and the choice of calibration samples.
        train_split: split to train on, an official one ("train" is mini_train in a mini version) or one that
            `splits.json` in the folder of tables names.
        train_splits: several splits to train on, such as train and val for a last training; `train_split`
            then has its default.
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
        calibration_split: split to calibrate on; null for `train_split`, or the first of `train_splits` that
            is not `val_split`.
        force_calibration_on_val: calibrate on samples of `val_split` too, which makes its scores too good.
        force_score_on_train: score samples that were trained on, likewise.
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
        train_split: str = DEFAULT_TRAIN_SPLIT,
        train_splits: list[str] | None = None,
        val_split: str = "val",
        test_split: str = "test",
        missing_scenes: MissingScenes = "error",
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
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"data.{name} is {value}: expected {least} or more")
        self.task, self.lidar_channel = DetectionTask.of(classes), lidar_channel
        self.task.ids(class_names)  # refuses foreign ones
        self.class_names = tuple(class_names)
        self.root, self.version, self.cache_dir = root, version, cache_dir
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.splits = SplitNames.of(train_split, train_splits, val_split, test_split, calibration_split)
        self._limits = Limits(sample_tokens, missing_scenes, force_calibration_on_val, force_score_on_train)
        self.num_calibration_samples = num_calibration_samples
        grid, points = (num_sweeps, voxel_size, point_cloud_range), (tuple(point_columns), intensity_scale)
        limits = (max_points_per_voxel, max_num_voxels_train, max_num_voxels_eval)
        self.settings = DataSettings(*grid, *limits, *points)
        config = SampleConfig.of_evaluation(self.settings, self.class_names, seed, drop_nonfinite_points)
        self.evaluation_config = dataclasses.replace(config, max_bad_sweeps=max_bad_sweeps)
        self._augmentation, self.gt_sampling, self.class_balanced = augmentation, gt_sampling, class_balanced
        self._index: NuScenesIndex | None = None
        self.clouds: list[Path] | None = None
        """Files to predict on instead of samples, set by whoever predicts; see `CloudFiles`."""
        self.num_bad_sweeps = 0
        """Clouds that this rank's last evaluation left out."""

    @cached_property
    def selection(self) -> Selection:
        """Which samples are for what."""
        num_sweeps, tell = self.settings.num_sweeps, rank_zero_only(say)
        return Selection(self.index, self.splits, self._limits, num_sweeps, tell)

    def prepare_data(self) -> None:
        """Builds the index, once per node; the process that does keeps it."""
        if self.clouds is None:
            _ = self.index

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

    @property
    def test_rows(self) -> Rows:
        """Index rows (S,) of the samples of the test split, over all ranks."""
        return self.selection.test_rows

    @property
    def predict_rows(self) -> Rows:
        """Index rows (S,) of `sample_tokens`, of whatever split; without any, of the test split.

        Where `clouds` are predicted on, the positions of the files.
        """
        if self.clouds is not None:
            return np.arange(len(self.clouds))
        return self.selection.predict_rows

    @property
    def calibration_rows(self) -> Rows:
        """Index rows (N,) of the `num_calibration_samples` samples to calibrate with, over all ranks.

        Raises:
            UserError: see `Selection.calibration_rows`.
        """
        return self.selection.calibration_rows(self.num_calibration_samples, self.seed)

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

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the data: the settings, and own classes."""
        own = {} if self.task == NUSCENES else {CLASSES_KEY: self.task.to_dict()}
        return {**self.settings.to_dict(), **own}

    def scored_info(self, num_bad_sweeps: int = 0) -> dict[str, Any]:
        """What `metrics.json` says of the data set: which, and what of the scored split was left out."""
        skipped = self.selection.skipped(self.splits.val)
        left_out = {"skipped_scenes": skipped, "num_bad_sweeps": num_bad_sweeps}
        return {**self.index.dataset_info(), **{name: value for name, value in left_out.items() if value}}
