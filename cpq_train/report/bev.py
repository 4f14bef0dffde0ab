"""One sample seen from above, kept in a run directory so that arms can be drawn together without the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
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
        gt_boxes: (G, 9) x y z dx dy dz yaw vx vy of the annotations of the ten classes with points inside.
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
    """Write a sample for drawing; points to about a centimetre."""
    columns = {name: getattr(sample, name) for name in BevSample.__dataclass_fields__}
    columns = {name: _compact(column) for name, column in columns.items()}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **columns | {"points": np.asarray(sample.points, np.float16)})


def _compact(column: Any) -> NDArray[Any]:
    array = np.asarray(column)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def read_bev_sample(path: Path) -> BevSample:
    """Read what `write_bev_sample` wrote.

    Raises:
        UserError: The file is damaged or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = BevSample.__dataclass_fields__.keys() - ({"gt_tokens"} - set(stored.files))
            columns = {name: stored[name] for name in names}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: not a readable {BEV_FILE} ({error})") from error
    return BevSample(**columns | {"token": str(columns["token"])})
