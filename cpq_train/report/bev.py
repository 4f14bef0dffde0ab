"""One sample seen from above, kept in a run directory so that arms can be drawn together without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.arrays import Column, check_columns, check_values, read_npz
from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.files import replacing
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Strings
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.predictions import LidarDetections

BEV_FILE = "bev_sample.npz"
MAX_POINTS = 60_000


@dataclass(frozen=True)
class BevSample:
    """Points, annotations and detections of one sample in the LiDAR frame of its key frame.

    Attributes:
        token: sample token.
        points: (P, 3) x, y, z, m.
        gt_boxes: (G, 9) x y z dx dy dz yaw vx vy of the annotations of the task with points inside.
        gt_labels: (G,) class ids.
        boxes: (N, 9) detections.
        scores: (N,) confidence.
        labels: (N,) class ids.
        gt_tokens: (G,) annotation tokens; none in files of the first release.
    """

    token: str
    points: NDArray[np.floating[Any]]
    gt_boxes: NDArray[np.floating[Any]]
    gt_labels: NDArray[np.integer[Any]]
    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]
    gt_tokens: Strings = field(default_factory=lambda: np.zeros(0, np.str_))


def busiest_sample(matches: Matches) -> str:
    """Token of the sample with the most annotations that count: the same one for every arm."""
    counts = np.bincount(matches.gt_sample, minlength=len(matches.sample_token))
    return str(matches.sample_token[counts.argmax()])


def bev_sample(
    index: NuScenesIndex, row: int, points: NDArray[np.floating[Any]], detections: LidarDetections
) -> BevSample:
    """Collect what is drawn of a sample.

    Args:
        index: the data set.
        row: sample row of the index.
        points: (P, 3 or more) cloud in the LiDAR frame; thinned evenly to `MAX_POINTS`.
        detections: the detections of the sample.
    """
    within = index.annotations(row)
    num_points = index.annotation_num_lidar_pts[within] + index.annotation_num_radar_pts[within]
    keep = (index.annotation_classes[within] >= 0) & (num_points > 0)
    return BevSample(
        token=index.sample_token(row),
        points=_thinned(points),
        gt_boxes=index.annotation_boxes[within][keep],
        gt_labels=index.annotation_classes[within][keep],
        boxes=detections.boxes,
        scores=detections.scores,
        labels=detections.labels,
        gt_tokens=np.char.decode(index.annotation_tokens[within][keep], "utf-8"),
    )


def bev_sample_of_cloud(
    name: str, points: NDArray[np.floating[Any]], detections: LidarDetections
) -> BevSample:
    """Collect what is drawn of a cloud without annotations; see `bev_sample`."""
    return BevSample(
        token=name,
        points=_thinned(points),
        gt_boxes=np.zeros((0, 9)),
        gt_labels=np.zeros(0, np.int64),
        boxes=detections.boxes,
        scores=detections.scores,
        labels=detections.labels,
    )


def _thinned(points: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    return points[:: -(-len(points) // MAX_POINTS) or 1, :3]


def write_bev_sample(path: Path, sample: BevSample) -> None:
    """Write a sample for drawing; points to 2 cm at 50 m and to 6 cm at 200 m."""
    columns = {name: getattr(sample, name) for name in BevSample.__dataclass_fields__}
    columns = {name: _compact(column) for name, column in columns.items()}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **columns | {"points": np.asarray(sample.points, np.float16)})


def _compact(column: Any) -> NDArray[Any]:
    array = np.asarray(column)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


_COLUMNS: Final = {
    "token": Column("U", ()),
    "points": Column("f", ("P", 3)),
    "gt_boxes": Column("f", ("G", 9)),
    "gt_labels": Column("i", ("G",)),
    "boxes": Column("f", ("N", 9)),
    "scores": Column("f", ("N",)),
    "labels": Column("i", ("N",)),
}
_GT_TOKENS: Final = {"gt_tokens": Column("U", ("G",))}
_FAR: Final = 1e6
"""Metres, radians and metres a second: no picture shows more."""


def read_bev_sample(path: Path, task: DetectionTask = NUSCENES) -> BevSample:
    """Read and check what `write_bev_sample` wrote.

    Args:
        path: The file.
        task: The classes that labels are of.

    Raises:
        UserError: The file is absent, damaged or something else.
    """
    arrays = read_npz(path, "sample")
    columns = _COLUMNS | (_GT_TOKENS if arrays.get("gt_tokens", np.zeros(0)).size else {})
    check_columns(arrays, columns, str(path))
    for name in ("gt_boxes", "boxes"):
        check_values(arrays[name][:, :7], -_FAR, _FAR, f"{path}: {name}")
    for name in ("gt_labels", "labels"):
        check_values(arrays[name], 0, len(task.names) - 1, f"{path}: {name}")
    check_values(arrays["scores"], 0, 1, f"{path}: scores")
    found: dict[str, Any] = {name: arrays[name] for name in columns}
    return BevSample(**found | {"token": str(arrays["token"])})
