"""What matching found, and its file `matches.npz`, from which scores and intervals can be computed again.

Letters in shapes: N detections, G annotations, T thresholds, M matches, S samples.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.arrays import Column, check_columns, check_values, read_npz
from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError, shown
from cpq_train.common.files import replacing
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.common.schema import check_schema
from cpq_train.evaluation.boxes import Bools, Floats, GroundTruth, Ints, Predictions, Strings
from cpq_train.evaluation.filtering import counts_as_detection, counts_as_ground_truth, ego_distance
from cpq_train.evaluation.matching import devkit_order, match, true_positive_errors
from cpq_train.evaluation.protocol import THRESHOLDS_M

SCHEMA = 1


@dataclass(frozen=True)
class Matches:
    """Detections and annotations that count, and how they match.

    Attributes:
        sample_token: (S,) tokens of the samples scored.
        sample_scene: (S,) row of each sample's scene in `scene_name`.
        scene_name: names of the scenes.
        pred_sample: (N,) sample row of each detection; detections are sorted by class, then falling score.
        pred_label: (N,) class id.
        pred_score: (N,) confidence.
        pred_range_m: (N,) distance from the ego vehicle.
        pred_row: (N,) row in the predictions before filtering.
        pred_match: (T, N) row of the annotation matched at each distance threshold, -1 for none.
        match_errors: (M, 5) `TP_ERRORS` of the matches, in the order of `np.nonzero(pred_match >= 0)`.
        gt_sample: (G,) sample row of each annotation.
        gt_label: (G,) class id.
        gt_range_m: (G,) distance from the ego vehicle.
        gt_num_points: (G,) LiDAR and radar points.
        gt_token: (G,) annotation tokens.
        task: classes and rules; `metrics.json` holds them, not the file of the matches.
    """

    sample_token: Strings
    sample_scene: Ints
    scene_name: Strings
    pred_sample: Ints
    pred_label: Ints
    pred_score: Floats
    pred_range_m: Floats
    pred_row: Ints
    pred_match: Ints
    match_errors: Floats
    gt_sample: Ints
    gt_label: Ints
    gt_range_m: Floats
    gt_num_points: Ints
    gt_token: Strings
    task: DetectionTask = NUSCENES

    @property
    def is_match(self) -> Bools:
        """(T, N) true-positive flags."""
        return self.pred_match >= 0


def find_matches(ground_truth: GroundTruth, predictions: Predictions) -> Matches:
    """Filter annotations and detections as nuscenes-devkit does, and match them."""
    samples, annotations = ground_truth.samples, ground_truth[counts_as_ground_truth(ground_truth)]
    rows = np.flatnonzero(counts_as_detection(predictions, ground_truth))
    rows = rows[devkit_order(predictions.boxes.label[rows], predictions.score[rows])]
    detections = predictions[rows]
    pred_match = match(annotations.boxes, detections.boxes)
    _, pred = np.nonzero(pred_match >= 0)
    pairs = annotations.boxes[pred_match[pred_match >= 0]], detections.boxes[pred]
    return Matches(
        sample_token=samples.tokens,
        sample_scene=samples.scene,
        scene_name=samples.scene_names,
        pred_sample=detections.boxes.sample,
        pred_label=detections.boxes.label,
        pred_score=detections.score,
        pred_range_m=ego_distance(detections.boxes, samples),
        pred_row=rows,
        pred_match=pred_match,
        match_errors=true_positive_errors(*pairs, ground_truth.task),
        gt_sample=annotations.boxes.sample,
        gt_label=annotations.boxes.label,
        gt_range_m=ego_distance(annotations.boxes, samples),
        gt_num_points=annotations.num_points,
        gt_token=annotations.tokens,
        task=ground_truth.task,
    )


_COMPACT = {
    "sample_scene": np.int32,
    "pred_sample": np.int32,
    "pred_label": np.int8,
    "pred_row": np.int32,
    "pred_match": np.int32,
    "gt_sample": np.int32,
    "gt_label": np.int8,
    "gt_num_points": np.int32,
}


def write_matches(path: Path, matches: Matches) -> None:
    """Write `matches.npz`: the columns of `Matches` under their names, thresholds and schema number."""
    columns = {name: getattr(matches, name) for name in _COLUMNS}
    for name, dtype in _COMPACT.items():
        columns[name] = columns[name].astype(dtype)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, schema=SCHEMA, thresholds_m=THRESHOLDS_M, **columns)


_COLUMNS: Final = {
    "sample_token": Column("U", ("S",)),
    "sample_scene": Column("i", ("S",)),
    "scene_name": Column("U", ("C",)),
    "pred_sample": Column("i", ("N",)),
    "pred_label": Column("i", ("N",)),
    "pred_score": Column("f", ("N",)),
    "pred_range_m": Column("f", ("N",)),
    "pred_row": Column("i", ("N",)),
    "pred_match": Column("i", (len(THRESHOLDS_M), "N")),
    "match_errors": Column("f", ("M", len(TP_ERRORS))),
    "gt_sample": Column("i", ("G",)),
    "gt_label": Column("i", ("G",)),
    "gt_range_m": Column("f", ("G",)),
    "gt_num_points": Column("i", ("G",)),
    "gt_token": Column("U", ("G",)),
}
_THRESHOLDS: Final = {"thresholds_m": Column("f", (len(THRESHOLDS_M),))}
_MOST: Final = 2**31 - 1
_LARGEST: Final = sys.float_info.max
"""Of scores: those of other detectors may be logits."""

_LEAST_ERROR: Final = -1e-6
"""An error of 0 may come out less by rounding."""


def read_matches(path: Path, task: DetectionTask = NUSCENES, is_ours: bool = True) -> Matches:
    """Read and check `matches.npz`.

    Args:
        path: the file.
        task: classes and rules of the run.
        is_ours: whether the detections are a network's of this project, whose scores lie between 0 and 1.

    Raises:
        UserError: The file is absent, no such file, of another schema, or damaged: an array of another kind
            or shape, a row or a class that does not exist, a number out of its bounds.
    """
    arrays = read_npz(path, "matches")
    check_schema(_single(arrays.get("schema")), SCHEMA, str(path))
    stated = {name: column for name, column in _THRESHOLDS.items() if name in arrays}
    check_columns(arrays, _COLUMNS | stated, str(path))
    if stated and arrays["thresholds_m"].tolist() != list(THRESHOLDS_M):
        seen = arrays["thresholds_m"].tolist()
        raise UserError(f"{path}: thresholds_m is {seen}; accepted: {list(THRESHOLDS_M)}")
    columns = {name: arrays[name] for name in _COLUMNS}
    for name in _COMPACT:
        columns[name] = columns[name].astype(np.int64)
    found = Matches(**columns, task=task)
    _check_bounds(found, path, is_ours)
    _check_rows(found, path)
    return found


def _single(array: NDArray[Any] | None) -> Any:
    return array.item() if array is not None and array.size == 1 else None


def _check_bounds(found: Matches, path: Path, is_ours: bool) -> None:
    last_sample, last_label = len(found.sample_token) - 1, len(found.task.names) - 1
    bounds: dict[str, tuple[float, float]] = {
        "sample_scene": (0, len(found.scene_name) - 1),
        "pred_sample": (0, last_sample),
        "pred_label": (0, last_label),
        "pred_score": (0, 1) if is_ours else (-_LARGEST, _LARGEST),
        "pred_range_m": (0, _MOST),
        "pred_row": (0, _MOST),
        "pred_match": (-1, len(found.gt_token) - 1),
        "match_errors": (_LEAST_ERROR, _MOST),
        "gt_sample": (0, last_sample),
        "gt_label": (0, last_label),
        "gt_range_m": (0, _MOST),
        "gt_num_points": (0, _MOST),
    }
    for name, (least, most) in bounds.items():
        check_values(getattr(found, name), least, most, f"{path}: {name}", unknown=name == "match_errors")


def _check_rows(found: Matches, path: Path) -> None:
    """See that rows are in their order, as many as they say, and each once."""
    num_matches, num_errors = int(np.count_nonzero(found.is_match)), len(found.match_errors)
    if num_matches != num_errors:
        raise UserError(f"{path}: {num_errors} match_errors; accepted: {num_matches}, one for each match")
    is_next_class = np.diff(found.pred_label) > 0
    is_in_order = is_next_class | ((np.diff(found.pred_label) == 0) & (np.diff(found.pred_score) <= 0))
    if not is_in_order.all():
        row = int(np.flatnonzero(~is_in_order)[0]) + 1
        raise UserError(f"{path}: row {row} of pred_score; accepted: sorted by class, then falling score")
    for name in ("sample_token", "scene_name", "gt_token"):
        values, counts = np.unique(getattr(found, name), return_counts=True)
        if (counts > 1).any():
            twice = shown(str(values[counts.argmax()]))
            raise UserError(f"{path}: {name} holds {twice} {counts.max()} times; accepted: each once")
