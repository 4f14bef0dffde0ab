"""Constants of the nuScenes detection task (nuscenes-devkit 1.2.0: `detection_cvpr_2019.json`, `algo.py`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.nuscenes import DETECTION_CLASSES

CLASS_RANGE_M: dict[str, float] = {
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}
"""Boxes at this distance from the ego vehicle or further count neither as ground truth nor as detections."""

CLASS_RANGES_M: NDArray[np.float64] = np.array([CLASS_RANGE_M[name] for name in DETECTION_CLASSES])
"""`CLASS_RANGE_M` by class id."""

THRESHOLDS_M = (0.5, 1.0, 2.0, 4.0)
"""Centre distances below which a detection matches; AP is averaged over them."""

TP_THRESHOLD_INDEX = THRESHOLDS_M.index(2.0)
"""The threshold whose matches give the true-positive errors."""

MIN_RECALL = 0.1
MIN_PRECISION = 0.1
RECALL_GRID: NDArray[np.float64] = np.linspace(0, 1, 101)
FIRST_RECALL_INDEX = round(100 * MIN_RECALL) + 1
"""First point of `RECALL_GRID` that counts: the one after the minimum recall."""

MEAN_AP_WEIGHT = 5
MAX_BOXES_PER_SAMPLE = 500

TP_ERRORS = ("ATE", "ASE", "AOE", "AVE", "AAE")
"""Translation (m), scale (1 - IoU), orientation (rad), velocity (m/s) and attribute (1 - accuracy) error."""

_UNDEFINED = {"traffic_cone": ("AOE", "AVE", "AAE"), "barrier": ("AVE", "AAE")}

DEFINED_ERRORS: NDArray[np.bool_] = np.array(
    [[error not in _UNDEFINED.get(name, ()) for error in TP_ERRORS] for name in DETECTION_CLASSES]
)
"""(classes, errors): which errors exist; cones have no heading, and neither cones nor barriers move."""

BIKE_RACK_CLASSES = ("bicycle", "motorcycle")
"""Classes that are not scored inside a bicycle rack."""

RANGE_BINS_M = ((0.0, 20.0), (20.0, 30.0), (30.0, 40.0), (40.0, 50.0))
"""Half-open bins [lower, upper) of the distance from the ego vehicle; their edges are the class ranges."""
