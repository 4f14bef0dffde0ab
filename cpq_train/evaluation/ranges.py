"""AP and true-positive errors by distance from the ego vehicle.

Matching happens once, over all distances. A detection or annotation belongs to the bin of its own distance,
a match to the bin of its annotation, so that a detection just across an edge is no false positive there. A
bin lists and averages the classes whose class range reaches it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpq_train.common.detection_task import DetectionTask
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.boxes import Bools
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Scores, curves, mean_over_classes, scores


def scores_per_range(matches: Matches) -> dict[str, dict[str, float]]:
    """AP of each range bin: `{"0-20": {"mAP": …, class: AP over the four thresholds, …}, …}`."""
    return {name: _bin_scores(found, upper) for name, upper, found in _per_bin(matches)}


def errors_per_range(matches: Matches) -> dict[str, dict[str, float | None]]:
    """True-positive errors of each range bin: `{"0-20": {"mATE": …, "mASE": …, …}, …}`.

    The units are those of `TP_ERRORS`. As over all distances, a class without a match counts as 1.
    """
    return {name: _mean_errors(found, upper) for name, upper, found in _per_bin(matches)}


def bin_name(lower: float, upper: float) -> str:
    """What a range bin is called, such as "0-20"."""
    return f"{lower:g}-{upper:g}"


def bin_names(task: DetectionTask) -> list[str]:
    """What the range bins of a task are called."""
    return [bin_name(*limits) for limits in task.range_bins_m]


def _per_bin(matches: Matches) -> Iterator[tuple[str, float, Scores]]:
    for lower, upper in matches.task.range_bins_m:
        gt_keep = (matches.gt_range_m >= lower) & (matches.gt_range_m < upper)
        found = curves(matches, _detections_of_bin(matches, gt_keep, lower, upper), gt_keep)
        yield bin_name(lower, upper), upper, scores(found, matches.task)


def classes_that_reach(task: DetectionTask, upper_m: float) -> list[str]:
    """The classes whose class range reaches the upper end of a bin."""
    return [name for name, rules in zip(task.names, task.rules, strict=True) if rules.range_m >= upper_m]


def _bin_scores(found: Scores, upper: float) -> dict[str, float]:
    ap = dict(zip(found.task.names, found.ap, strict=True))
    per_class = {name: float(ap[name].mean()) for name in classes_that_reach(found.task, upper)}
    return {"mAP": float(np.mean(list(per_class.values()))), **per_class}


def _mean_errors(found: Scores, upper: float) -> dict[str, float | None]:
    means = mean_over_classes(found.errors[upper <= found.task.ranges_m])
    return {
        f"m{error}": None if np.isnan(mean) else float(mean)
        for error, mean in zip(TP_ERRORS, means, strict=True)
    }


def _detections_of_bin(matches: Matches, gt_keep: Bools, lower: float, upper: float) -> Bools:
    """(T, N) matches of the bin's annotations, and false positives inside the bin."""
    own_bin = (matches.pred_range_m >= lower) & (matches.pred_range_m < upper)
    of_annotation = np.append(gt_keep, False)[matches.pred_match]
    return np.where(matches.is_match, of_annotation, own_bin)
