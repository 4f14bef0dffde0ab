"""The metric against published scores: a real detector's submission, and OpenPCDet's on synthetic data."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpq_train.common.detection_task import NUSCENES
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import GroundTruth
from cpq_train.evaluation.filtering import counts_as_ground_truth
from cpq_train.evaluation.ground_truth import ground_truth
from cpq_train.evaluation.metric import Scores, evaluate
from cpq_train.evaluation.protocol import THRESHOLDS_M
from cpq_train.evaluation.submission import read_submission

DEVKIT_ERRORS = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")


def assert_equals_summary(
    scores: Scores, summary: dict[str, dict[str, dict[str, float]]], atol: float
) -> None:
    ap = [
        [summary["label_aps"][name][str(threshold)] for threshold in THRESHOLDS_M]
        for name in DETECTION_CLASSES
    ]
    errors = [
        [summary["label_tp_errors"][name][error] for error in DEVKIT_ERRORS] for name in DETECTION_CLASSES
    ]
    np.testing.assert_allclose(scores.ap, ap, rtol=0, atol=atol)
    np.testing.assert_allclose(scores.errors, errors, rtol=0, atol=atol)
    means = [summary["tp_errors"][error] for error in DEVKIT_ERRORS]
    np.testing.assert_allclose(scores.mean_errors, means, rtol=0, atol=atol)
    assert scores.mean_ap == pytest.approx(summary["mean_ap"], abs=atol)
    assert scores.nds == pytest.approx(summary["nd_score"], abs=atol)


def test_real_submission(realdata_dir: Path, mini_gt: GroundTruth) -> None:
    predictions = read_submission(realdata_dir / "eval/results_nusc.json", mini_gt.samples.tokens)
    scores = evaluate(mini_gt, predictions).scores
    summary = json.loads((realdata_dir / "eval/metrics_summary.json").read_text())
    assert_equals_summary(scores, summary, 1e-12)
    assert scores.mean_ap == pytest.approx(0.07551617930781714, abs=1e-12)
    assert scores.nds == pytest.approx(0.10336284386435349, abs=1e-12)


def test_ground_truth_left_after_each_filter(mini_gt: GroundTruth) -> None:
    boxes = mini_gt.boxes
    distance = np.linalg.norm(boxes.translation[:, :2] - mini_gt.samples.ego_xy[boxes.sample], axis=1)
    within = distance < NUSCENES.ranges_m[boxes.label]
    assert len(boxes) == 4441
    assert within.sum() == 3785
    assert (within & (mini_gt.num_points > 0)).sum() == 3393
    assert counts_as_ground_truth(mini_gt).sum() == 3393


def test_golden_submission(golden_dir: Path, fake_index: NuScenesIndex) -> None:
    annotations = ground_truth(fake_index, fake_index.sample_rows("val"))
    predictions = read_submission(golden_dir / "golden_submission.json", annotations.samples.tokens)
    summary = json.loads((golden_dir / "golden_fake_metrics.json").read_text())
    assert_equals_summary(evaluate(annotations, predictions).scores, summary, 1e-12)
