"""AP per range: a hand-made scene, and agreement with the whole where all boxes lie in one bin."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_problems import random_boxes, random_problem, random_samples

from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation.boxes import Boxes, GroundTruth, Predictions
from cpq_train.evaluation.metric import Evaluation, evaluate
from cpq_train.evaluation.ranges import errors_per_range, scores_per_range


def cars_at(distances: list[float]) -> Boxes:
    samples = random_samples(1, 1, np.random.default_rng(0))
    samples.ego_xy[:] = 0
    boxes = random_boxes(len(distances), samples, np.array([0]), np.random.default_rng(0))
    boxes.translation[:] = np.column_stack([distances, np.zeros((len(distances), 2))])
    return boxes


def evaluate_cars(annotated: list[float], detected: list[float]) -> Evaluation:
    samples = random_samples(1, 1, np.random.default_rng(0))
    samples.ego_xy[:] = 0
    gt = cars_at(annotated)
    ones = np.ones(len(gt), int)
    annotations = GroundTruth(samples, gt, ones, ones.astype(str), gt[np.zeros(0, int)])
    scores = np.linspace(0.9, 0.5, len(detected))
    return evaluate(annotations, Predictions(cars_at(detected), scores))


def car_ap(evaluation: Evaluation) -> list[float]:
    return [scores["car"] for scores in scores_per_range(evaluation.matches).values()]


def test_a_match_belongs_to_the_bin_of_its_annotation() -> None:
    """The first detection lies beyond the edge at 20 m but matches the car before it."""
    assert car_ap(evaluate_cars([19.9, 25.0], [20.1, 25.0])) == pytest.approx([1, 1, 0, 0])


def test_a_false_positive_belongs_to_its_own_bin() -> None:
    """It ranks first, so precision rises from 0 to 1/2 with the recall of its bin, and stays 1 elsewhere."""
    ap = car_ap(evaluate_cars([10.0, 25.0], [35.0, 15.0, 10.0, 25.0]))
    precision = np.linspace(0, 0.5, 101)[11:]
    assert ap == pytest.approx([np.maximum(precision - 0.1, 0).mean() / 0.9, 1, 0, 0])


def test_bins_are_half_open() -> None:
    assert car_ap(evaluate_cars([20.0], [20.0])) == pytest.approx([0, 1, 0, 0])


def test_bins_average_the_classes_that_reach_them() -> None:
    found = evaluate(*random_problem(1, 200, 300, num_classes=10))
    per_range = scores_per_range(found.matches)
    classes = {name: [key for key in scores if key != "mAP"] for name, scores in per_range.items()}
    assert classes["0-20"] == classes["20-30"] == list(DETECTION_CLASSES)
    assert set(DETECTION_CLASSES) - set(classes["30-40"]) == {"barrier", "traffic_cone"}
    assert classes["40-50"] == ["car", "truck", "construction_vehicle", "bus", "trailer"]
    for scores in per_range.values():
        assert scores["mAP"] == pytest.approx(np.mean([scores[name] for name in scores if name != "mAP"]))


def test_one_bin_with_everything_is_the_whole() -> None:
    found = evaluate(*random_problem(2, 200, 400, num_classes=10))
    matches = replace(
        found.matches,
        pred_range_m=np.full(len(found.matches.pred_label), 5.0),
        gt_range_m=found.matches.gt_range_m * 0,
    )
    scores = scores_per_range(matches)["0-20"]
    np.testing.assert_allclose(
        [scores[name] for name in DETECTION_CLASSES], found.scores.ap.mean(axis=1), atol=1e-12
    )
    assert scores["mAP"] == pytest.approx(found.scores.mean_ap, abs=1e-12)
    assert found.scores.mean_ap > 0


def test_errors_of_one_bin_with_everything_are_the_whole() -> None:
    found = evaluate(*random_problem(2, 200, 400, num_classes=10))
    matches = replace(
        found.matches,
        pred_range_m=np.full(len(found.matches.pred_label), 5.0),
        gt_range_m=found.matches.gt_range_m * 0,
    )
    errors = errors_per_range(matches)
    np.testing.assert_allclose(list(errors["0-20"].values()), found.scores.mean_errors, atol=1e-12)
    assert list(errors["40-50"].values()) == [1.0] * 5
    assert errors["0-20"]["mATE"] < 1


def test_errors_belong_to_the_bin_of_the_annotation() -> None:
    """The first car is found 0.5 m off, the second one 1 m off."""
    errors = errors_per_range(evaluate_cars([10.0, 25.0], [10.5, 26.0]).matches)
    classes = [10, 10, 8, 5]  # that reach a bin; all but cars have no match, and count 1
    assert errors["0-20"]["mATE"] == pytest.approx((0.5 + classes[0] - 1) / classes[0])
    assert errors["20-30"]["mATE"] == pytest.approx((1.0 + classes[1] - 1) / classes[1])
    assert errors["30-40"]["mATE"] == 1
