"""Constants of the nuScenes metric, whatever the classes (nuscenes-devkit 1.2.0: `detection_cvpr_2019.json`).

What depends on the classes is in `common.detection_task`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
