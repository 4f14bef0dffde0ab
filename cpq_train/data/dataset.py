"""Samples as network input: points, boxes, augmentation and voxels of one sample, and batches of them.

Every random draw comes from a generator seeded by (seed, epoch, position in the data set), in evaluation by
the sample's row, so that what is loaded does not depend on the number of workers or ranks. Shape letters:
B batch, V voxels, F features of a point, N boxes of a sample, M boxes of the fullest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import NotRequired, Self

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.augmentation import Augmentation
from cpq_train.data.bad_sweeps import check_share
from cpq_train.data.boxes import Float64, is_inside
from cpq_train.data.census import MIN_LIDAR_POINTS
from cpq_train.data.gt_sampling import GtSampler
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.labels import labels_of_ids
from cpq_train.data.points.files import CloudError
from cpq_train.data.points.format import PointFormat
from cpq_train.data.settings import DataSettings
from cpq_train.data.sweeps import MAX_NUM_SWEEPS, NUSCENES_POINTS, BadSweeps, load_sweeps
from cpq_train.data.voxelization import Voxelizer, grid_cells

_EVALUATION_SEED = 0
"""Evaluation shuffles like training does, always in the same way."""

MAX_BAD_DRAWS = 20
"""Key frames that cannot be used, drawn for one training sample, before it is an error. Each draw reads all
sweeps of a sample; where half of the key frames are bad, one sample in a million needs more."""

SampleKey = tuple[int, int]
"""Epoch and position in the data set; what the sampler of the data module yields."""


class Item(TypedDict):
    """One sample."""

    voxel_features: Tensor
    """(V, F) float32 means of x, y, z, further features of the points, time lag."""
    voxel_coords: Tensor
    """(V, 3) int32 z, y, x."""
    gt_boxes: Tensor
    """(N, 10) float32 x, y, z, l, w, h, yaw, vx, vy, label; label 1 is the network's first class."""
    sample_row: int
    token: str
    bad_sweeps: NotRequired[list[str]]
    """What is wrong with the clouds that were left out, where there are any."""


class Batch(TypedDict):
    """Several samples."""

    voxel_features: Tensor
    """(V, F) float32 over all samples."""
    voxel_coords: Tensor
    """(V, 4) int32 sample in the batch, z, y, x."""
    batch_size: int
    gt_boxes: Tensor
    """(B, M, 10) float32, rows of zeros behind a sample's last box."""
    sample_rows: Tensor
    """(B,) int64 rows of the index."""
    tokens: list[str]
    bad_sweeps: NotRequired[list[str]]
    """Of all samples; the loader takes them out."""


@dataclass(frozen=True)
class SampleConfig:
    """How a sample is loaded; training and evaluation differ in the last three and in `max_num_voxels`.

    Attributes:
        num_sweeps: 1 (the key frame alone) to 10.
        voxel_size: x, y, z in metres.
        point_cloud_range: minimum x, y, z and maximum x, y, z in metres.
        max_points_per_voxel: further points of a voxel are dropped.
        max_num_voxels: further voxels of a sample are dropped.
        class_names: the network's classes, in the order of labels.
        seed: of all random draws in training.
        augmentation: None for evaluation.
        is_training: drop boxes outside the range, and replace samples without boxes.
        points: how they lie in the cloud files.
        max_bad_sweeps: share of an epoch's clouds that may be left out because they cannot be used.
    """

    num_sweeps: int
    voxel_size: tuple[float, float, float]
    point_cloud_range: tuple[float, float, float, float, float, float]
    max_points_per_voxel: int
    max_num_voxels: int
    class_names: tuple[str, ...] = DETECTION_CLASSES
    seed: int = 0
    augmentation: Augmentation | None = None
    is_training: bool = False
    points: PointFormat = NUSCENES_POINTS
    max_bad_sweeps: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.max_bad_sweeps)
        if not 1 <= self.num_sweeps <= MAX_NUM_SWEEPS:
            raise UserError(f"num_sweeps is {self.num_sweeps}: expected 1 to {MAX_NUM_SWEEPS}")
        grid_cells(self.voxel_size, self.point_cloud_range)

    @classmethod
    def of_evaluation(
        cls,
        settings: DataSettings,
        class_names: Sequence[str] = DETECTION_CLASSES,
        seed: int = 0,
        drop_nonfinite_points: bool = False,
    ) -> Self:
        """How a sample is loaded that is evaluated or calibrated with."""
        return cls(
            settings.num_sweeps,
            settings.voxel_size,
            settings.point_cloud_range,
            settings.max_points_per_voxel,
            settings.max_num_voxels_eval,
            tuple(class_names),
            seed,
            points=replace(settings.points, drop_nonfinite=drop_nonfinite_points),
        )

    @property
    def skips_bad_sweeps(self) -> bool:
        """Whether a cloud that cannot be used is left out, and no error."""
        return self.max_bad_sweeps > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, to hash: without settings of points that are nuScenes', as ever."""
        ordinary = {"points": NUSCENES_POINTS, "max_bad_sweeps": 0.0}
        usual = {name for name, value in ordinary.items() if getattr(self, name) == value}
        return {name: value for name, value in asdict(self).items() if name not in usual}


def voxelizer_of(config: SampleConfig) -> Voxelizer:
    """The voxelizer of samples of this kind."""
    return Voxelizer(
        config.voxel_size, config.point_cloud_range, config.max_points_per_voxel, config.max_num_voxels
    )


class DetectionDataset(Dataset[Item]):
    """Samples of an index by position.

    Args:
        index: the data set's index.
        rows: (S,) rows of the samples, in the order of positions.
        config: how to load them.
        gt_sampler: what training scenes are filled up by; None for nothing.
    """

    def __init__(
        self,
        index: NuScenesIndex,
        rows: NDArray[np.int64],
        config: SampleConfig,
        gt_sampler: GtSampler | None = None,
    ) -> None:
        self.index = index
        self.rows = rows
        self.config = config
        self.gt_sampler = gt_sampler
        self._voxelizer = voxelizer_of(config)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: SampleKey | int) -> Item:
        """Loads the sample at a position, in epoch 0 unless the key names another.

        Raises:
            CloudError: a cloud of it is missing, truncated or holds NaN or infinite values; or, where some
                may be so, `MAX_BAD_DRAWS` key frames are.
        """
        epoch, position = (0, key) if isinstance(key, int) else key
        row = int(self.rows[position])
        rng = self._generator(epoch, position)
        notes: list[str] = []
        num_bad = 0
        for _ in range(len(self)):
            bad: BadSweeps | None = {} if self.config.skips_bad_sweeps else None
            points, boxes = self._scene(row, epoch, rng, bad)
            notes += bad.values() if bad else ()
            has_key_frame = not bad or int(self.index.sample_frames[row]) not in bad
            if not self.config.is_training or (has_key_frame and len(boxes)):
                return self._item(row, points, boxes, rng, notes)
            num_bad += not has_key_frame
            if num_bad == MAX_BAD_DRAWS:
                break
            row = int(rng.choice(self.rows))
        if num_bad:
            raise CloudError(
                f"no sample to train on: {num_bad} that were drawn have a key frame that cannot be used; the "
                f"first left out: {notes[0]}"
            )
        raise UserError(
            f"{len(self)} draws found no sample with an object inside point_cloud_range "
            f"{list(self.config.point_cloud_range)}: training needs some"
        )

    def _generator(self, epoch: int, position: int) -> np.random.Generator:
        if self.config.is_training:  # by position: a sample may come several times in an epoch
            return np.random.default_rng([self.config.seed, epoch, position])
        return np.random.default_rng([_EVALUATION_SEED, int(self.rows[position])])

    def _scene(
        self, row: int, epoch: int, rng: np.random.Generator, bad: BadSweeps | None
    ) -> tuple[NDArray[np.float32], Float64]:
        """Points (P, F) and labelled boxes (N, 10) of a sample, filled up and augmented."""
        points = load_sweeps(self.index, row, self.config.num_sweeps, self.config.points, bad)
        boxes = target_boxes(self.index, row, self.config.class_names)
        if self.gt_sampler is not None and self.gt_sampler.is_on(epoch):
            points, boxes = self.gt_sampler.fill(points, boxes, visible_boxes(self.index, row), rng)
        if self.config.augmentation is not None:
            self.config.augmentation.apply(points, boxes[:, :9], rng)
        if self.config.is_training:
            boxes = boxes[is_inside(boxes, self.config.point_cloud_range)]
        return points, boxes

    def _item(
        self,
        row: int,
        points: NDArray[np.float32],
        boxes: Float64,
        rng: np.random.Generator,
        notes: list[str],
    ) -> Item:
        features, cells, _ = self._voxelizer(points, rng.permutation(len(points)))
        item: Item = {
            "voxel_features": features,
            "voxel_coords": cells,
            "gt_boxes": torch.from_numpy(boxes.astype(np.float32)),
            "sample_row": row,
            "token": self.index.sample_token(row),
        }
        if notes:
            item["bad_sweeps"] = notes
        return item


def points_of(index: NuScenesIndex, row: int, config: SampleConfig) -> NDArray[np.float32]:
    """The points (P, F) of a sample as it is evaluated."""
    bad: BadSweeps | None = {} if config.skips_bad_sweeps else None
    return load_sweeps(index, row, config.num_sweeps, config.points, bad)


def target_boxes(index: NuScenesIndex, row: int, class_names: Sequence[str] = DETECTION_CLASSES) -> Float64:
    """Boxes (N, 10) of a sample that a network can learn: of one of its classes, with LiDAR points.

    An unknown velocity becomes 0, as OpenPCDet has it. Column 9 is the label, 1 for the first class.
    """
    annotations = _visible(index, row)
    labels = labels_of_ids(class_names, index.task)[index.annotation_classes[annotations]]
    is_target = labels > 0
    boxes = np.nan_to_num(index.annotation_boxes[annotations[is_target]], nan=0.0)
    return np.column_stack([boxes, labels[is_target]])


def visible_boxes(index: NuScenesIndex, row: int) -> Float64:
    """Boxes (N, 9) of a sample with LiDAR points, of categories outside the detection task too."""
    return index.annotation_boxes[_visible(index, row)]


def _visible(index: NuScenesIndex, row: int) -> NDArray[np.int64]:
    """Annotation rows of a sample with LiDAR points."""
    where = index.annotations(row)
    return np.flatnonzero(index.annotation_num_lidar_pts[where] >= MIN_LIDAR_POINTS) + np.int64(where.start)


def collate(items: Sequence[Item]) -> Batch:
    """Joins samples into a batch."""
    num_voxels = torch.tensor([len(item["voxel_coords"]) for item in items])
    batch_column = torch.repeat_interleave(torch.arange(len(items), dtype=torch.int32), num_voxels)
    cells = torch.cat([item["voxel_coords"] for item in items])
    boxes = [item["gt_boxes"] for item in items]
    batch: Batch = {
        "voxel_features": torch.cat([item["voxel_features"] for item in items]),
        "voxel_coords": torch.cat([batch_column[:, None], cells], dim=1),
        "batch_size": len(items),
        "gt_boxes": torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True),
        "sample_rows": torch.tensor([item["sample_row"] for item in items]),
        "tokens": [item["token"] for item in items],
    }
    if notes := [note for item in items for note in item.get("bad_sweeps", ())]:
        batch["bad_sweeps"] = notes
    return batch
