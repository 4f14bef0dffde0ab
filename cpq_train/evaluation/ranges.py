"""AP and true-positive errors by distance from the ego vehicle.

Matching happens once, over all distances. A detection or annotation belongs to the bin of its own distance,
a match to the bin of its annotation, so that a detection just across an edge is no false positive there. A
bin lists and averages the classes whose class range reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation.boxes import Bools
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Curves, Scores, average_precision, curves, scores
from cpq_train.evaluation.protocol import CLASS_RANGE_M, CLASS_RANGES_M, RANGE_BINS_M, TP_ERRORS


def scores_per_range(matches: Matches) -> dict[str, dict[str, float]]:
    """AP of each range bin: `{"0-20": {"mAP": …, class: AP over the four thresholds, …}, …}`."""
    return {bin_name(lower, upper): _bin_scores(found, upper) for lower, upper, found in _per_bin(matches)}


def errors_per_range(matches: Matches) -> dict[str, dict[str, float]]:
    """True-positive errors of each range bin: `{"0-20": {"mATE": …, "mASE": …, …}, …}`.

    The units are those of `TP_ERRORS`. As over all distances, a class without a match counts as 1.
    """
    return {
        bin_name(lower, upper): _mean_errors(scores(found), upper)
        for lower, upper, found in _per_bin(matches)
    }


def bin_name(lower: float, upper: float) -> str:
    """What a bin of `RANGE_BINS_M` is called, such as "0-20"."""
    return f"{lower:g}-{upper:g}"


def _per_bin(matches: Matches) -> Iterator[tuple[float, float, Curves]]:
    for lower, upper in RANGE_BINS_M:
        gt_keep = (matches.gt_range_m >= lower) & (matches.gt_range_m < upper)
        yield lower, upper, curves(matches, _detections_of_bin(matches, gt_keep, lower, upper), gt_keep)


def _bin_scores(found: Curves, upper: float) -> dict[str, float]:
    per_class = {
        name: float(class_ap.mean())
        for name, class_ap in zip(DETECTION_CLASSES, average_precision(found.precision), strict=True)
        if CLASS_RANGE_M[name] >= upper
    }
    return {"mAP": float(np.mean(list(per_class.values()))), **per_class}


def _mean_errors(found: Scores, upper: float) -> dict[str, float]:
    means = np.nanmean(found.errors[upper <= CLASS_RANGES_M], axis=0)
    return {f"m{error}": float(mean) for error, mean in zip(TP_ERRORS, means, strict=True)}


def _detections_of_bin(matches: Matches, gt_keep: Bools, lower: float, upper: float) -> Bools:
    """(T, N) matches of the bin's annotations, and false positives inside the bin."""
    own_bin = (matches.pred_range_m >= lower) & (matches.pred_range_m < upper)
    of_annotation = np.append(gt_keep, False)[matches.pred_match]
    return np.where(matches.is_match, of_annotation, own_bin)
