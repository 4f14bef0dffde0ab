"""Objects of other samples pasted into a training scene, by OpenPCDet's rules.

Each class is filled up to a target number of objects. An object is pasted where it was seen, with its points
of all sweeps and their time lags; a candidate that overlaps an object of the scene, an earlier pasted one or
another candidate of its class in bird's-eye view is dropped, and the points of the scene that lie in a
pasted box are removed. OpenPCDet walks through a permutation of each class that lives as long as its loading
process; here candidates are drawn without replacement for each sample on its own, so that a scene does not
depend on what was loaded before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.box_geometry import boxes_overlap, points_in_boxes
from cpq_train.data.boxes import Float64
from cpq_train.data.gt_database import GtDatabase
from cpq_train.data.labels import labels_of_ids

Points = NDArray[np.float32]
Rows = NDArray[np.int64]

TARGETS: Mapping[str, int] = MappingProxyType(
    {
        "car": 2,
        "truck": 3,
        "construction_vehicle": 7,
        "bus": 4,
        "trailer": 6,
        "barrier": 2,
        "motorcycle": 6,
        "bicycle": 6,
        "pedestrian": 2,
        "traffic_cone": 2,
    }
)
"""Objects of each class that OpenPCDet's nuScenes configurations fill a scene up to."""


@dataclass(frozen=True)
class GtSampling:
    """How scenes are filled up with objects of the GT database.

    Attributes:
        targets: objects of each class that a scene is filled up to, counting those that it has; classes
            are filled in this order, and a class that is not named, or not the network's, is not filled.
        min_points: objects with fewer points, over all sweeps, are not sampled.
        fade_out_epochs: nothing is sampled in this many last epochs, which see the true density of objects.
    """

    targets: dict[str, int] = field(default_factory=lambda: dict(TARGETS))
    min_points: int = 5
    fade_out_epochs: int = 0

    def __post_init__(self) -> None:
        for name, number in self.targets.items():
            if number < 0:
                raise UserError(f"gt_sampling targets {name} is {number}: expected 0 or more")
        for name, least in (("min_points", 1), ("fade_out_epochs", 0)):
            if getattr(self, name) < least:
                raise UserError(f"gt_sampling {name} is {getattr(self, name)}: expected {least} or more")


class GtSampler:
    """Fills scenes up with objects of a database.

    Args:
        database: where the objects come from.
        config: how many of which.
        class_names: the network's classes, in the order of labels; others are not sampled.
        num_epochs: of the training; needed to fade out.

    Raises:
        UserError: a target is of no class of the task, no object of a class with a target has enough points,
            or the number of epochs is needed and unknown.
    """

    def __init__(
        self,
        database: GtDatabase,
        config: GtSampling,
        class_names: Sequence[str] = DETECTION_CLASSES,
        num_epochs: int | None = None,
    ) -> None:
        if config.fade_out_epochs and num_epochs is None:
            raise UserError(
                f"gt_sampling fade_out_epochs is {config.fade_out_epochs}, and the number of epochs is not "
                "known: set trainer.max_epochs"
            )
        self._database = database
        self._num_epochs = None if num_epochs is None else num_epochs - config.fade_out_epochs
        task = database.task
        self._label_of_id = labels_of_ids(class_names, task)
        has_enough = database.num_points >= config.min_points
        self._pools: list[tuple[int, int, Rows]] = []  # label, target, rows of the database
        for name, target in config.targets.items():
            if name not in task.names:
                raise UserError(f"gt_sampling targets names {name!r}: accepted are {', '.join(task.names)}")
            class_id = task.names.index(name)
            label = int(self._label_of_id[class_id])
            if label:
                pool = np.flatnonzero(has_enough & (database.classes == class_id))
                self._pools.append((label, target, pool))
        if not any(len(pool) for _, target, pool in self._pools if target):
            raise UserError(
                f"gt_sampling: {database.folder} holds no object with {config.min_points} points or more "
                f"of {', '.join(config.targets) or 'any class'}: expected some"
            )

    def is_on(self, epoch: int) -> bool:
        """Whether objects are sampled in an epoch."""
        return self._num_epochs is None or epoch < self._num_epochs

    def fill(
        self, points: Points, boxes: Float64, obstacles: Float64, rng: np.random.Generator
    ) -> tuple[Points, Float64]:
        """Pastes objects into a scene.

        Args:
            points: (P, 5) of the scene.
            boxes: (N, 10) labelled boxes of the scene; column 9 is the label.
            obstacles: (M, 9) boxes that a pasted one may not overlap, those of `boxes` among them.
            rng: where the draws come from.

        Returns:
            Points, the pasted ones first, and boxes, the pasted ones last; new arrays.
        """
        rows = self._choose(boxes[:, 9].astype(np.int64), obstacles, rng)
        pasted = self._labelled_boxes(rows)
        is_covered = np.zeros(len(points), dtype=np.bool_)
        for inside in points_in_boxes(points, pasted):
            is_covered[inside] = True
        clouds = [self._database.points_of(row).T for row in rows.tolist()]
        # Columns stay contiguous, as `load_sweeps` has them.
        joined = np.concatenate([*clouds, points.T[:, ~is_covered]], axis=1).T
        return joined, np.concatenate([boxes, pasted])

    def _choose(self, labels: Rows, obstacles: Float64, rng: np.random.Generator) -> Rows:
        """Rows of the database that fit into a scene of objects of these labels."""
        chosen = [np.empty(0, dtype=np.int64)]
        for candidates in self._draw(labels, rng):
            boxes = self._database.boxes[candidates]
            among = boxes_overlap(boxes, boxes)
            np.fill_diagonal(among, False)
            fits = ~(among.any(axis=1) | boxes_overlap(boxes, obstacles).any(axis=1))
            obstacles = np.concatenate([obstacles, boxes[fits]])
            chosen.append(candidates[fits])
        return np.concatenate(chosen)

    def _draw(self, labels: Rows, rng: np.random.Generator) -> Iterator[Rows]:
        """Candidates of each class of which the scene has fewer than its target."""
        for label, target, pool in self._pools:
            number = min(target - int(np.count_nonzero(labels == label)), len(pool))
            if number > 0:
                yield rng.choice(pool, number, replace=False)

    def _labelled_boxes(self, rows: Rows) -> Float64:
        """Boxes (N, 10); an unknown velocity becomes 0, as in a scene."""
        boxes = np.nan_to_num(self._database.boxes[rows], nan=0.0)
        return np.column_stack([boxes, self._label_of_id[self._database.classes[rows]]])
