"""Random problems against nuscenes-devkit's own functions: filters, accumulate, calc_ap, calc_tp."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_problems import devkit_boxes, devkit_filter, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionMetrics

from cpq_train.common.detection_task import NUSCENES
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation.boxes import GroundTruth, Predictions
from cpq_train.evaluation.filtering import counts_as_detection, counts_as_ground_truth
from cpq_train.evaluation.metric import evaluate
from cpq_train.evaluation.protocol import (
    MAX_BOXES_PER_SAMPLE,
    MEAN_AP_WEIGHT,
    MIN_PRECISION,
    MIN_RECALL,
    THRESHOLDS_M,
    TP_THRESHOLD_INDEX,
)

CONFIG = config_factory("detection_cvpr_2019")
CLASS_RANGE_M = dict(zip(NUSCENES.names, NUSCENES.ranges_m.tolist(), strict=True))


def both_filtered(annotations: GroundTruth, predictions: Predictions) -> tuple[EvalBoxes, EvalBoxes]:
    samples = annotations.samples
    gt_boxes = devkit_boxes(annotations.boxes, samples, num_points=annotations.num_points)
    pred_boxes = devkit_boxes(predictions.boxes, samples, score=predictions.score)
    return tuple(devkit_filter(boxes, annotations, CONFIG.class_range) for boxes in (gt_boxes, pred_boxes))


def assert_equals_devkit(annotations: GroundTruth, predictions: Predictions) -> None:
    ours = evaluate(annotations, predictions)
    gt_boxes, pred_boxes = both_filtered(annotations, predictions)
    metrics = DetectionMetrics(CONFIG)
    for label, name in enumerate(DETECTION_CLASSES):
        for row, threshold in enumerate(THRESHOLDS_M):
            curve = accumulate(gt_boxes, pred_boxes, name, CONFIG.dist_fcn_callable, threshold)
            theirs = [getattr(curve, error) for error in TP_METRICS]
            close(ours.curves.precision[label, row], curve.precision)
            close(ours.curves.confidence[label, row], curve.confidence)
            close(ours.curves.errors[label, row], theirs)
            metrics.add_label_ap(name, threshold, calc_ap(curve, CONFIG.min_recall, CONFIG.min_precision))
            if row == TP_THRESHOLD_INDEX:
                for error in TP_METRICS:
                    metrics.add_label_tp(name, error, calc_tp(curve, CONFIG.min_recall, error))
    for error, value in enumerate(ours.scores.errors.T):
        theirs = np.array([metrics.get_label_tp(name, TP_METRICS[error]) for name in DETECTION_CLASSES])
        close(value, np.where(np.isnan(value), np.nan, theirs))
        for label in np.flatnonzero(np.isnan(value)):
            metrics.add_label_tp(DETECTION_CLASSES[label], TP_METRICS[error], np.nan)
    close(ours.scores.mean_ap, metrics.mean_ap)
    close(ours.scores.nds, metrics.nd_score)


def close(ours: object, theirs: object) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), num_gt=st.integers(0, 60), num_pred=st.integers(0, 120))
def test_random_boxes(seed: int, num_gt: int, num_pred: int) -> None:
    assert_equals_devkit(*random_problem(seed, num_gt, num_pred))


def test_one_crowded_class() -> None:
    """Many detections compete for the annotations of one class and one sample."""
    annotations, predictions = random_problem(7, 150, 600, num_classes=1, num_samples=1, num_scenes=1)
    label = annotations.boxes.label[0]
    predictions.boxes.label[:] = label
    assert evaluate(annotations, predictions).scores.ap[label].max() > 0.05
    assert_equals_devkit(annotations, predictions)


@pytest.mark.parametrize("seed", range(5))
def test_filters_keep_the_same_boxes(seed: int) -> None:
    annotations, predictions = random_problem(seed, 300, 300, num_classes=10)
    annotations.boxes.label[::3] = predictions.boxes.label[::3] = DETECTION_CLASSES.index("bicycle")
    near = annotations.racks.translation[0] + np.random.default_rng(seed).uniform(-4, 4, (300, 3))
    for boxes in (annotations.boxes, predictions.boxes):
        boxes.translation[::6], boxes.sample[::6] = near[::6], annotations.racks.sample[0]
    gt_boxes, pred_boxes = both_filtered(annotations, predictions)
    kept = (
        annotations.boxes[counts_as_ground_truth(annotations)],
        predictions.boxes[counts_as_detection(predictions, annotations)],
    )
    for ours, theirs in zip(kept, (gt_boxes, pred_boxes), strict=True):
        mine = sorted(map(tuple, ours.translation.tolist()))
        assert mine == sorted(box.translation for box in theirs.all)
    without_racks = replace(annotations, racks=annotations.racks[np.zeros(0, int)])
    assert counts_as_detection(predictions, without_racks).sum() > len(kept[1])


def test_boxes_on_the_class_range_do_not_count() -> None:
    annotations, _ = random_problem(0, 1, 0)
    for label, name in enumerate(DETECTION_CLASSES):
        annotations.boxes.label[:], annotations.num_points[:] = label, 1
        for distance, num_kept in ((CLASS_RANGE_M[name], 0), (np.nextafter(CLASS_RANGE_M[name], 0), 1)):
            annotations.samples.ego_xy[:] = 0
            annotations.boxes.translation[:] = [0, distance, 0]
            assert counts_as_ground_truth(annotations).sum() == num_kept


def test_constants_are_those_of_the_devkit() -> None:
    assert CONFIG.class_range == CLASS_RANGE_M
    assert tuple(CONFIG.dist_ths) == THRESHOLDS_M
    assert CONFIG.dist_th_tp == THRESHOLDS_M[TP_THRESHOLD_INDEX]
    assert (CONFIG.min_recall, CONFIG.min_precision) == (MIN_RECALL, MIN_PRECISION)
    assert (CONFIG.max_boxes_per_sample, CONFIG.mean_ap_weight) == (MAX_BOXES_PER_SAMPLE, MEAN_AP_WEIGHT)
