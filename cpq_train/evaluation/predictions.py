"""From a network's detections in the LiDAR frame to predictions in the global frame.

Attributes follow OpenPCDet's rule (`nuscenes_utils.transform_det_annos_to_nusc_annos`): above 0.2 m/s a
vehicle moves and a cycle has a rider; otherwise the most frequent attribute of the class, which the task
names. Barriers and cones have none: OpenPCDet writes "cycle.with_rider" there, which the metric ignores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.data.boxes import GlobalBoxes, lidar_to_global
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Boxes, Floats, Ints, Predictions
from cpq_train.evaluation.protocol import MAX_BOXES_PER_SAMPLE

MOVING_SPEED_MPS = 0.2


class LidarDetections(NamedTuple):
    """Detections of one sample.

    Attributes:
        boxes: (N, 9) x y z dx dy dz yaw vx vy in the LiDAR frame of the key frame, m, rad and m/s.
        scores: (N,) confidence.
        labels: (N,) class ids, of the task.
    """

    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]


def assign_attributes(labels: Ints, velocity: Floats, task: DetectionTask = NUSCENES) -> Ints:
    """(N,) attribute ids of class ids (N,) of a task that move at (N, 2) m/s."""
    is_fast = np.hypot(velocity[:, 0], velocity[:, 1]) > MOVING_SPEED_MPS
    ids: Ints = task.slow_and_fast[labels, is_fast.astype(np.int64)]
    return ids


def best_detections(detections: LidarDetections) -> LidarDetections:
    """The 500 detections of highest score, in their order; the official server takes no more."""
    if len(detections.scores) <= MAX_BOXES_PER_SAMPLE:
        return detections
    rows = np.sort(np.argsort(-detections.scores, kind="stable")[:MAX_BOXES_PER_SAMPLE])
    return LidarDetections(detections.boxes[rows], detections.scores[rows], detections.labels[rows])


def predictions_from_detections(
    index: NuScenesIndex, rows: Ints, detections: Mapping[int, LidarDetections]
) -> Predictions:
    """Detections in the global frame, with attributes, at most 500 a sample, sorted by sample.

    Args:
        index: the data set.
        rows: (S,) sample rows of the index that are scored, each once.
        detections: sample row of the index to its detections; exactly the rows that are scored.

    Raises:
        UserError: Samples are missing or do not belong to the rows that are scored.
    """
    if detections.keys() != set(rows.tolist()):
        missing, foreign = set(rows.tolist()) - detections.keys(), detections.keys() - set(rows.tolist())
        raise UserError(
            f"detections for {len(detections)} samples: {len(missing)} missing, {len(foreign)} unknown, "
            f"such as {index.sample_token(min(missing or foreign))}; "
            f"accepted: the {len(rows)} samples that are scored"
        )
    best = [best_detections(LidarDetections(*detections[row])) for row in rows.tolist()]
    placed = [_in_global_frame(index, *pair) for pair in zip(rows.tolist(), best, strict=True)]
    return _joined(best, placed, index.task)


def predictions_in_lidar_frame(detections: Sequence[LidarDetections], task: DetectionTask) -> Predictions:
    """Detections of clouds of unknown pose, where they are, with attributes, at most 500 a cloud."""
    best = [best_detections(LidarDetections(*found)) for found in detections]
    still, origin = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(3)
    placed = [lidar_to_global(found.boxes, still, origin, still, origin) for found in best]
    return _joined(best, placed, task)


def _joined(
    best: Sequence[LidarDetections], placed: Sequence[GlobalBoxes], task: DetectionTask
) -> Predictions:
    """The detections of samples as one table, `sample` counting from 0."""
    translation, size, rotation, velocity = (np.concatenate(column) for column in zip(*placed, strict=True))
    labels = np.concatenate([found.labels for found in best]).astype(np.int64)
    boxes = Boxes(
        sample=np.repeat(np.arange(len(best)), [len(found.scores) for found in best]),
        label=labels,
        translation=translation,
        size=size,
        rotation=rotation,
        velocity=velocity,
        attribute=assign_attributes(labels, velocity, task),
    )
    return Predictions(boxes, np.concatenate([found.scores for found in best]).astype(np.float64), task)


def _in_global_frame(index: NuScenesIndex, row: int, detections: LidarDetections) -> GlobalBoxes:
    return lidar_to_global(
        detections.boxes,
        index.sample_lidar_rotations[row],
        index.sample_lidar_translations[row],
        index.sample_ego_rotations[row],
        index.sample_ego_translations[row],
    )
