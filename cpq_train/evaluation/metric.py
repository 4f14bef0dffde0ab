"""AP, true-positive errors and NDS from matches, as nuscenes-devkit 1.2.0 computes them in `algo.py`.

Letters in shapes: C classes, T thresholds, N detections, G annotations, M matches, R recall points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.boxes import Bools, Floats, GroundTruth, Predictions
from cpq_train.evaluation.matches import Matches, find_matches
from cpq_train.evaluation.protocol import (
    FIRST_RECALL_INDEX,
    MEAN_AP_WEIGHT,
    MIN_PRECISION,
    RECALL_GRID,
    THRESHOLDS_M,
    TP_THRESHOLD_INDEX,
)


@dataclass(frozen=True)
class Curves:
    """Curves over `RECALL_GRID`.

    Attributes:
        precision: (C, T, R); 0 beyond the highest recall reached.
        confidence: (C, T, R) score at which the recall is reached; 0 beyond.
        errors: (C, T, 5, R) mean of each error over the matches of at least that score; 1 without matches.
    """

    precision: Floats
    confidence: Floats
    errors: Floats


@dataclass(frozen=True)
class Scores:
    """The nuScenes detection scores, of its classes or of others.

    Attributes:
        ap: (C, T) average precision.
        errors: (C, 5) errors of `TP_ERRORS`, NaN where the class has none.
        task: the classes.
    """

    ap: Floats
    errors: Floats
    task: DetectionTask = NUSCENES

    @property
    def mean_ap(self) -> float:
        """MAP: mean over thresholds and classes."""
        return float(self.ap.mean(axis=1).mean())

    def mean_ap_of(self, class_names: Sequence[str]) -> float:
        """MAP over some of the classes, such as those that a network was trained for."""
        return float(self.ap.mean(axis=1)[self.task.ids(class_names)].mean())

    @property
    def mean_errors(self) -> Floats:
        """(5,) errors averaged over the classes that have them; NaN where none has."""
        return mean_over_classes(self.errors)

    @property
    def nds(self) -> float | None:
        """NuScenes detection score: (5 mAP + Σ max(0, 1 - error)) / 10; None for classes of others."""
        if not self.task.is_nuscenes:
            return None
        return float(nuscenes_detection_score(np.array(self.mean_ap), self.mean_errors))

    @property
    def headline(self) -> dict[str, float]:
        """MAP, and NDS where there is one."""
        return {"mAP": self.mean_ap} | ({} if self.nds is None else {"NDS": self.nds})


@dataclass(frozen=True)
class Evaluation:
    """Scores with what they were computed from."""

    scores: Scores
    curves: Curves
    matches: Matches


def evaluate(ground_truth: GroundTruth, predictions: Predictions) -> Evaluation:
    """Score detections as nuscenes-devkit's `DetectionEval` does."""
    matches = find_matches(ground_truth, predictions)
    found = curves(matches)
    return Evaluation(scores(found, matches.task), found, matches)


def nuscenes_detection_score(mean_ap: Floats, mean_errors: Floats) -> Floats:
    """NDS of any number of results: (…,) mAP and (…, 5) mean errors to (…,)."""
    tp_scores = np.maximum(0.0, 1.0 - mean_errors).sum(axis=-1)
    nds: Floats = (MEAN_AP_WEIGHT * mean_ap + tp_scores) / (MEAN_AP_WEIGHT + len(TP_ERRORS))
    return nds


def mean_over_classes(errors: Floats) -> Floats:
    """(C, …) errors to (…,) their means over the classes that have them; NaN where none has."""
    known = ~np.isnan(errors)
    count = known.sum(axis=0)
    mean: Floats = np.where(known, errors, 0).sum(axis=0) / np.where(count, count, np.nan)
    return mean


def average_precision(precision: Floats) -> Floats:
    """(…, R) precision over the recall grid to (…,) AP: recall and precision up to 0.1 are cut off."""
    above = np.maximum(precision[..., FIRST_RECALL_INDEX:] - MIN_PRECISION, 0.0)
    ap: Floats = above.mean(axis=-1) / (1.0 - MIN_PRECISION)
    return ap


def curves(matches: Matches, pred_keep: Bools | None = None, gt_keep: Bools | None = None) -> Curves:
    """Interpolated curves of every class and threshold.

    Args:
        matches: what matching found.
        pred_keep: (T, N) detections that count at each threshold; all by default.
        gt_keep: (G,) annotations that count; all by default.
    """
    shape = (len(matches.task.names), len(THRESHOLDS_M))
    found = Curves(
        np.zeros((*shape, len(RECALL_GRID))),
        np.zeros((*shape, len(RECALL_GRID))),
        np.ones((*shape, len(TP_ERRORS), len(RECALL_GRID))),
    )
    keep = np.ones(matches.pred_match.shape, bool) if pred_keep is None else pred_keep
    num_gt = np.bincount(
        matches.gt_label if gt_keep is None else matches.gt_label[gt_keep], minlength=shape[0]
    )
    errors_at = np.cumsum(matches.is_match).reshape(matches.pred_match.shape) - 1
    ends = np.searchsorted(matches.pred_label, np.arange(shape[0]), side="right")
    starts = np.searchsorted(matches.pred_label, np.arange(shape[0]), side="left")
    for label, threshold in np.ndindex(shape):
        rows = np.arange(starts[label], ends[label])[keep[threshold, starts[label] : ends[label]]]
        is_match = matches.is_match[threshold, rows]
        if num_gt[label] and is_match.any():
            errors = matches.match_errors[errors_at[threshold, rows[is_match]]]
            curve = _interpolated(matches.pred_score[rows], is_match, errors, int(num_gt[label]))
            found.precision[label, threshold], found.confidence[label, threshold] = curve[:2]
            found.errors[label, threshold] = curve[2]
    return found


def scores(found: Curves, task: DetectionTask = NUSCENES) -> Scores:
    """AP and true-positive errors of the curves of a task's classes."""
    errors = np.array([_mean_errors(*curve) for curve in _at_tp_threshold(found)])
    return Scores(average_precision(found.precision), np.where(task.defined_errors, errors, np.nan), task)


def _at_tp_threshold(found: Curves) -> zip[tuple[Floats, Floats]]:
    return zip(found.confidence[:, TP_THRESHOLD_INDEX], found.errors[:, TP_THRESHOLD_INDEX], strict=True)


def _mean_errors(confidence_R: Floats, errors_5R: Floats) -> Floats:
    """(5,) mean from the minimum recall to the highest recall reached; 1 where that is below the minimum."""
    reached = np.flatnonzero(confidence_R)
    if len(reached) == 0 or reached[-1] < FIRST_RECALL_INDEX:
        return np.ones(len(TP_ERRORS))
    mean: Floats = errors_5R[:, FIRST_RECALL_INDEX : reached[-1] + 1].mean(axis=1)
    return mean


def _interpolated(
    score_N: Floats, is_match_N: Bools, errors_M5: Floats, num_gt: int
) -> tuple[Floats, Floats, Floats]:
    true_positives = np.cumsum(is_match_N).astype(float)
    precision_N = true_positives / np.arange(1, len(score_N) + 1)
    recall_N = true_positives / num_gt
    precision = np.interp(RECALL_GRID, recall_N, precision_N, right=0)
    confidence = np.interp(RECALL_GRID, recall_N, score_N, right=0)
    rising_score = score_N[is_match_N][::-1]
    errors = [
        np.interp(confidence[::-1], rising_score, _cumulative_mean(error)[::-1])[::-1]
        for error in errors_M5.T
    ]
    return precision, confidence, np.stack(errors)


def _cumulative_mean(values: Floats) -> Floats:
    """Mean up to each position without the NaNs; 0 before the first number, 1 where there is none at all."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones(len(values))
    count = np.cumsum(known)
    return np.divide(np.nancumsum(values), count, out=np.zeros(len(values)), where=count != 0)
