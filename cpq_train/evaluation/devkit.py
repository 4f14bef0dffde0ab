"""The same scores from nuscenes-devkit itself: the reference, and the engine for who wants it.

The devkit is slow to import and to run (minutes for the validation split), so it is imported inside.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import LIDAR_TOP
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Strings
from cpq_train.evaluation.metric import Scores
from cpq_train.evaluation.protocol import THRESHOLDS_M

CONFIG = "detection_cvpr_2019"


def check_devkit(index: NuScenesIndex) -> None:
    """See that nuscenes-devkit can score a data set.

    Raises:
        UserError: its classes or its LiDAR are not nuScenes' own.
    """
    for name, is_usual in (
        ("data.classes", index.task.is_nuscenes),
        (f"data.lidar_channel {index.lidar_channel!r}", index.lidar_channel == LIDAR_TOP),
    ):
        if not is_usual:
            raise UserError(f"engine is 'devkit', which does not know {name}; accepted: vectorised")


def evaluate_with_devkit(
    root: Path, version: str, submission: Path, sample_tokens: Strings, task: DetectionTask = NUSCENES
) -> Scores:
    """Score a written submission with nuscenes-devkit's `DetectionEval`.

    The devkit only knows whole splits: the samples are given, the filters, matching and scores are its own.

    Args:
        root: root of the data set.
        version: its version, such as "v1.0-trainval".
        submission: a file that `write_submission` or another tool wrote.
        sample_tokens: (S,) the samples that the submission covers.
        task: the devkit's own classes, in whatever order.
    """
    from nuscenes import NuScenes
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.common.loaders import (
        add_center_dist,
        filter_eval_boxes,
        load_gt_of_sample_tokens,
        load_prediction,
    )
    from nuscenes.eval.detection.constants import TP_METRICS
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval

    class SamplesEval(DetectionEval):
        def __init__(self) -> None:
            self.cfg = config_factory(CONFIG)
            self.verbose = False
            nusc = NuScenes(version, str(root), verbose=False)
            predictions, self.meta = load_prediction(
                str(submission), self.cfg.max_boxes_per_sample, DetectionBox
            )
            annotations = load_gt_of_sample_tokens(nusc, sample_tokens.tolist(), DetectionBox)
            self.pred_boxes, self.gt_boxes = (
                filter_eval_boxes(nusc, add_center_dist(nusc, boxes), self.cfg.class_range)
                if boxes.all
                else boxes  # the devkit cannot filter a set without any box
                for boxes in (predictions, annotations)
            )

    metrics, _ = SamplesEval().evaluate()
    ap = [[metrics.get_label_ap(name, threshold) for threshold in THRESHOLDS_M] for name in task.names]
    errors = [[metrics.get_label_tp(name, error) for error in TP_METRICS] for name in task.names]
    return Scores(np.array(ap), np.where(task.defined_errors, np.array(errors), np.nan), task)
