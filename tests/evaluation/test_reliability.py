"""Calibration of confidence: by hand, and for scores that are chances."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation_problems import random_problem

from cpq_train.evaluation.matches import Matches, find_matches
from cpq_train.evaluation.reliability import reliability


def matches_with(scores: list[float], hits: list[bool]) -> Matches:
    found = find_matches(*random_problem(0, 20, 20))
    none = np.full((4, len(scores)), -1)
    none[2] = np.where(hits, 0, -1)
    none[3] = 0  # matches within 4 m do not count
    return replace(found, pred_score=np.array(scores), pred_match=none)


def test_by_hand() -> None:
    """0.05 and 0.06 miss; of 0.55, 0.58 and 0.59 two match; 1.0 lies in the last bin and matches."""
    scores = [0.05, 0.06, 0.55, 0.58, 0.59, 1.0]
    found = reliability(matches_with(scores, [False, False, True, False, True, True]))
    assert found.count.tolist() == [2, 0, 0, 0, 0, 3, 0, 0, 0, 1]
    assert found.precision[[0, 5, 9]] == pytest.approx([0, 2 / 3, 1])
    assert found.confidence[[0, 5, 9]] == pytest.approx([0.055, 1.72 / 3, 1])
    assert np.isnan(found.precision[1])
    expected = (2 * 0.055 + 3 * (2 / 3 - 1.72 / 3) + 0) / 6
    assert found.expected_error == pytest.approx(expected)
    document = found.to_document()
    assert document["precision"][1] is None
    assert document["expected_error"] == pytest.approx(expected)


def test_scores_that_are_chances_have_no_error() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random(200_000)
    calibrated = reliability(matches_with(scores.tolist(), (generator.random(200_000) < scores).tolist()))
    assert calibrated.expected_error < 0.01
    too_sure = reliability(matches_with(scores.tolist(), (generator.random(200_000) < scores / 2).tolist()))
    assert too_sure.expected_error == pytest.approx(0.25, abs=0.01)


def test_no_detections() -> None:
    found = reliability(matches_with([], []))
    assert found.to_document()["expected_error"] is None
