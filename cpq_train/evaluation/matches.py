"""What matching found, and its file `matches.npz`, from which scores and intervals can be computed again.

Letters in shapes: N detections, G annotations, T thresholds, M matches, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cpq_train.common.errors import UserError
from cpq_train.common.files import replacing
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
        match_errors=true_positive_errors(*pairs),
        gt_sample=annotations.boxes.sample,
        gt_label=annotations.boxes.label,
        gt_range_m=ego_distance(annotations.boxes, samples),
        gt_num_points=annotations.num_points,
        gt_token=annotations.tokens,
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
    columns = {field.name: getattr(matches, field.name) for field in fields(matches)}
    for name, dtype in _COMPACT.items():
        columns[name] = columns[name].astype(dtype)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, schema=SCHEMA, thresholds_m=THRESHOLDS_M, **columns)


def read_matches(path: Path) -> Matches:
    """Read `matches.npz`.

    Raises:
        UserError: The file is absent, no such file, or of another schema.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{path}: not a readable matches.npz ({error})") from error
    schema = columns.pop("schema", None)
    columns.pop("thresholds_m", None)
    missing = {field.name for field in fields(Matches)} - columns.keys()
    check_schema(None if schema is None else schema.item(), SCHEMA, str(path))
    if missing:
        raise UserError(f"{path}: columns {sorted(missing)} are missing; accepted: all of `Matches`")
    for name in _COMPACT:
        columns[name] = columns[name].astype(np.int64)
    return Matches(**columns)
