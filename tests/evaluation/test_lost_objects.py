"""Objects lost and won: a scene by hand, and the operating score against a search over all thresholds."""

import csv
import io

import numpy as np
import pytest
from evaluation_problems import random_boxes, random_problem, random_samples

from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation.boxes import Boxes, GroundTruth, Predictions
from cpq_train.evaluation.lost_objects import (
    COLUMNS,
    UNMATCHED,
    changes,
    counts,
    match_scores,
    operating_scores,
    write_changes,
)
from cpq_train.evaluation.matches import Matches, find_matches


def cars_at(distances: list[float]) -> tuple[GroundTruth, Boxes]:
    samples = random_samples(1, 1, np.random.default_rng(0))
    samples.ego_xy[:] = 0
    boxes = random_boxes(len(distances), samples, np.array([0]), np.random.default_rng(0))
    boxes.translation[:] = np.column_stack([distances, np.zeros((len(distances), 2))])
    tokens = np.array([f"car{row}" for row in range(len(distances))])
    num_points = 1 + 10 * np.arange(len(distances))
    return GroundTruth(samples, boxes, num_points, tokens, boxes[np.zeros(0, int)]), boxes


def found_at(scores: list[float]) -> Matches:
    """Cars at 10, 25, 35 and 45 m, each detected with a score; 0 is not detected."""
    annotations, boxes = cars_at([10.0, 25.0, 35.0, 45.0])
    rows = np.flatnonzero(scores)
    return find_matches(annotations, Predictions(boxes[rows], np.array(scores)[rows]))


FLOAT = [0.9, 0.8, 0.6, 0.0]


def test_by_hand() -> None:
    """Float runs at 0.6. The other arm drops the second car, is unsure of the third, and finds the fourth."""
    baseline, other = found_at(FLOAT), found_at([0.7, 0.0, 0.5, 0.65])
    assert operating_scores(baseline)[0] == 0.6
    assert np.isinf(operating_scores(baseline)[1])
    found = changes(baseline, other)
    assert found.is_lost.tolist() == [False, True, True, False]
    assert found.is_won.tolist() == [False, False, False, True]
    groups = counts(found)
    assert groups["all"]["all"] == {"objects": 4, "found_by_float": 3, "lost": 2, "won": 1}
    assert groups["class"]["car"] == groups["all"]["all"]
    assert groups["class"]["bus"]["objects"] == 0
    assert [cell["lost"] for cell in groups["range_m"].values()] == [0, 1, 1, 0]
    assert [cell["lost"] for cell in groups["num_points"].values()] == [0, 1, 1, 0]
    assert groups["num_points"]["21-100"]["won"] == 1


def test_list() -> None:
    file = io.StringIO()
    write_changes(file, {"ptq": changes(found_at(FLOAT), found_at([0.7, 0.0, 0.5, 0.65]))})
    header, *rows = csv.reader(file.getvalue().splitlines())
    assert header == list(COLUMNS)
    assert rows == [
        ["ptq", "lost", "sample0", "car1", "car", "25.00", "11", "0.8000", ""],
        ["ptq", "lost", "sample0", "car2", "car", "35.00", "21", "0.6000", "0.5000"],
        ["ptq", "won", "sample0", "car3", "car", "45.00", "31", "", "0.6500"],
    ]


def test_scores_below_0_are_scores() -> None:
    """Logits: what float misses at -3 it does not find, and a match of score 0 is one."""
    baseline, other = found_at([-0.5, -1.0, -3.0, 0.0]), found_at([-0.2, 0.0, -0.1, -4.0])
    assert operating_scores(baseline)[0] == -3.0
    found = changes(baseline, other)
    assert found.is_found_by_float.tolist() == [True, True, True, False]
    assert found.is_found.tolist() == [True, False, True, False]
    file = io.StringIO()
    write_changes(file, {"other": found})
    assert file.getvalue().splitlines()[1:] == ["other,lost,sample0,car1,car,25.00,11,-1.0000,"]


def test_the_same_result_changes_nothing() -> None:
    found = find_matches(*random_problem(3, 200, 400))
    same = changes(found, found)
    assert same.is_found.any()
    assert not (same.is_lost | same.is_won).any()


def test_operating_score_is_the_best_of_all() -> None:
    annotations, predictions = random_problem(7, 300, 300, num_classes=3)
    found = find_matches(annotations, predictions)
    best = operating_scores(found)
    matched = match_scores(found)
    for label in np.unique(found.gt_label):
        of_class = matched[found.gt_label == label]
        rows = found.pred_label == label

        def f1(score: float) -> float:
            hits = np.count_nonzero(of_class >= score)  # noqa: B023
            return float(2 * hits / (np.count_nonzero(found.pred_score[rows] >= score) + len(of_class)))  # noqa: B023

        scores = np.unique(found.pred_score[rows])
        if (of_class > UNMATCHED).any():
            assert f1(best[label]) == pytest.approx(max(map(f1, scores)), abs=0.05), DETECTION_CLASSES[label]
