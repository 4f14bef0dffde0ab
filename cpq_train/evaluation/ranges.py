"""AP by distance from the ego vehicle.

Matching happens once, over all distances. A detection or annotation belongs to the bin of its own distance,
a match to the bin of its annotation, so that a detection just across an edge is no false positive there. A
bin lists and averages the classes whose class range reaches it.
"""

from __future__ import annotations

import numpy as np

from cpq_train.evaluation.boxes import Bools
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import average_precision, curves
from cpq_train.evaluation.protocol import CLASS_RANGE_M, RANGE_BINS_M
from cpq_train.nuscenes import DETECTION_CLASSES


def scores_per_range(matches: Matches) -> dict[str, dict[str, float]]:
    """AP of each range bin: `{"0-20": {"mAP": …, class: AP over the four thresholds, …}, …}`."""
    return {f"{lower:g}-{upper:g}": _bin_scores(matches, lower, upper) for lower, upper in RANGE_BINS_M}


def _bin_scores(matches: Matches, lower: float, upper: float) -> dict[str, float]:
    gt_keep = (matches.gt_range_m >= lower) & (matches.gt_range_m < upper)
    ap = average_precision(
        curves(matches, _detections_of_bin(matches, gt_keep, lower, upper), gt_keep).precision
    )
    per_class = {
        name: float(class_ap.mean())
        for name, class_ap in zip(DETECTION_CLASSES, ap, strict=True)
        if CLASS_RANGE_M[name] >= upper
    }
    return {"mAP": float(np.mean(list(per_class.values()))), **per_class}


def _detections_of_bin(matches: Matches, gt_keep: Bools, lower: float, upper: float) -> Bools:
    """(T, N) matches of the bin's annotations, and false positives inside the bin."""
    own_bin = (matches.pred_range_m >= lower) & (matches.pred_range_m < upper)
    of_annotation = np.append(gt_keep, False)[matches.pred_match]
    return np.where(matches.is_match, of_annotation, own_bin)
