"""Boxes as columns: what the metric computes on, without a Python object per box.

Letters in shapes: N boxes, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from cpq_train.common.detection_task import NUSCENES, DetectionTask

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Strings = NDArray[np.str_]


@dataclass(frozen=True)
class Boxes:
    """N boxes in the global frame of nuScenes.

    Attributes:
        sample: (N,) row of each box in its `Samples`.
        label: (N,) class id of the task; -1 for a box of no class (a bicycle rack).
        translation: (N, 3) centre, m.
        size: (N, 3) width, length, height, m.
        rotation: (N, 4) quaternion w, x, y, z; any scale.
        velocity: (N, 2) x and y, m/s; NaN where unknown.
        attribute: (N,) attribute id of the task, -1 for none.
    """

    sample: Ints
    label: Ints
    translation: Floats
    size: Floats
    rotation: Floats
    velocity: Floats
    attribute: Ints

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: Ints | Bools) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def yaw(self) -> Floats:
        """(N,) heading in the global x-y plane, rad: where the rotated x axis points."""
        w, x, y, z = self.rotation.T
        yaw: Floats = np.arctan2(2 * (x * y + w * z), w * w + x * x - y * y - z * z)
        return yaw


@dataclass(frozen=True)
class Samples:
    """The S samples that are scored.

    Attributes:
        tokens: (S,) sample tokens.
        scene: (S,) row of each sample's scene in `scene_names`.
        scene_names: names of the scenes that occur.
        ego_xy: (S, 2) position of the ego vehicle at the LiDAR's key frame, global frame, m.
    """

    tokens: Strings
    scene: Ints
    scene_names: Strings
    ego_xy: Floats

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class GroundTruth:
    """Annotations of the task's classes, in the order of the annotation table within each sample.

    Attributes:
        samples: the samples that are scored.
        boxes: N annotated boxes.
        num_points: (N,) LiDAR and radar points inside each box.
        tokens: (N,) annotation tokens.
        racks: boxes of bicycle racks.
        task: classes and rules.
    """

    samples: Samples
    boxes: Boxes
    num_points: Ints
    tokens: Strings
    racks: Boxes
    task: DetectionTask = NUSCENES

    def __getitem__(self, rows: Ints | Bools) -> Self:
        selected = (self.boxes[rows], self.num_points[rows], self.tokens[rows])
        return type(self)(self.samples, *selected, self.racks, self.task)


@dataclass(frozen=True)
class Predictions:
    """Detections; among equal scores a later row is taken first, as nuscenes-devkit does.

    Attributes:
        boxes: N detected boxes.
        score: (N,) confidence.
        task: classes and rules.
    """

    boxes: Boxes
    score: Floats
    task: DetectionTask = NUSCENES

    def __getitem__(self, rows: Ints | Bools) -> Self:
        return type(self)(self.boxes[rows], self.score[rows], self.task)
