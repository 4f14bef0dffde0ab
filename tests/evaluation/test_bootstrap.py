"""Resampling over scenes: against scoring the repeated scenes themselves."""

from dataclasses import fields

import numpy as np
import pytest
from evaluation_problems import random_problem
from numpy.typing import NDArray

from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.boxes import Boxes, GroundTruth, Predictions, Samples
from cpq_train.evaluation.matches import find_matches
from cpq_train.evaluation.metric import Scores, evaluate


def concatenate(parts: list[Boxes], samples_each: int) -> Boxes:
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Boxes)
    }
    repeats = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return Boxes(**columns | {"sample": columns["sample"] + repeats * samples_each})


def score_drawn_scenes(
    annotations: GroundTruth, predictions: Predictions, weights: NDArray[np.float64]
) -> Scores:
    """Score a data set in which each scene occurs as often as it was drawn."""
    samples = annotations.samples
    drawn = np.repeat(np.arange(len(weights)), weights.astype(int))
    gt_scene, scene = samples.scene[annotations.boxes.sample], samples.scene[predictions.boxes.sample]
    all_samples = Samples(
        np.tile(samples.tokens, len(drawn)),
        np.tile(samples.scene, len(drawn)),
        samples.scene_names,
        np.tile(samples.ego_xy, (len(drawn), 1)),
    )
    gt = [annotations[gt_scene == chosen] for chosen in drawn]
    found = [predictions[scene == chosen] for chosen in drawn]
    repeated = GroundTruth(
        all_samples,
        concatenate([part.boxes for part in gt], len(samples)),
        np.concatenate([part.num_points for part in gt]),
        np.concatenate([part.tokens for part in gt]),
        concatenate([annotations.racks] * len(drawn), len(samples)),
    )
    boxes = concatenate([part.boxes for part in found], len(samples))
    return evaluate(repeated, Predictions(boxes, np.concatenate([part.score for part in found]))).scores


@pytest.fixture(scope="module")
def problem() -> tuple[GroundTruth, Predictions]:
    annotations, predictions = random_problem(11, 900, 1800, num_classes=3, num_samples=24, num_scenes=6)
    annotations.num_points[:] = 1
    near = np.random.default_rng(0).random(len(predictions.score)) < 0.4
    rows = np.random.default_rng(1).integers(0, 900, near.sum())
    for name in ("sample", "label", "translation"):
        getattr(predictions.boxes, name)[near] = getattr(annotations.boxes, name)[rows]
    return annotations, Predictions(
        predictions.boxes, np.random.default_rng(2).random(len(predictions.score))
    )


def test_unit_weights_give_the_scores(problem: tuple[GroundTruth, Predictions]) -> None:
    scores = evaluate(*problem).scores
    again = bootstrap.resample(find_matches(*problem), np.ones((1, 6)))
    assert scores.mean_ap > 0.05
    assert again.mean_ap[0] == pytest.approx(scores.mean_ap, abs=1e-12)
    assert again.nds[0] == pytest.approx(scores.nds, abs=1e-3)


def test_weights_are_repeated_scenes(problem: tuple[GroundTruth, Predictions]) -> None:
    weights = bootstrap.scene_weights(6, num_resamples=8, seed=1)
    resampled = bootstrap.resample(find_matches(*problem), weights)
    drawn = [score_drawn_scenes(*problem, row) for row in weights]
    np.testing.assert_allclose(resampled.mean_ap, [scores.mean_ap for scores in drawn], rtol=0, atol=2e-3)
    np.testing.assert_allclose(resampled.nds, [scores.nds for scores in drawn], rtol=0, atol=5e-3)
    assert np.ptp(resampled.mean_ap) > 0.01


def test_few_runs_change_little(
    problem: tuple[GroundTruth, Predictions], monkeypatch: pytest.MonkeyPatch
) -> None:
    matches, weights = find_matches(*problem), bootstrap.scene_weights(6, 50)
    exact = bootstrap.resample(matches, weights)
    monkeypatch.setattr(bootstrap, "MAX_BINS", 40)
    coarse = bootstrap.resample(matches, weights)
    assert 0 < np.abs(coarse.mean_ap - exact.mean_ap).max() < 2e-3
    np.testing.assert_allclose(coarse.nds, exact.nds, rtol=0, atol=5e-3)


def test_seed_decides(problem: tuple[GroundTruth, Predictions]) -> None:
    matches = find_matches(*problem)
    first, again, other = (
        bootstrap.interval(bootstrap.resample(matches, bootstrap.scene_weights(6, 100, seed)).nds)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[0] < evaluate(*problem).scores.nds < first[1]


def test_weights_draw_as_many_scenes_as_there_are() -> None:
    weights = bootstrap.scene_weights(7, 200)
    assert weights.shape == (200, 7)
    np.testing.assert_array_equal(weights.sum(axis=1), 7)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.25)


def test_a_class_that_a_resample_misses_keeps_its_value(problem: tuple[GroundTruth, Predictions]) -> None:
    annotations, predictions = problem
    label = annotations.boxes.label[0]
    gone = (annotations.boxes.label == label) & (annotations.samples.scene[annotations.boxes.sample] != 0)
    partial = annotations[~gone]
    matches = find_matches(partial, predictions)
    without_scene_0 = bootstrap.resample(matches, np.array([[0.0, 1, 1, 1, 1, 2]]))
    own = evaluate(partial, predictions).scores.ap[label].mean()
    others = partial[partial.boxes.label != label]
    rest = bootstrap.resample(find_matches(others, predictions), np.array([[0.0, 1, 1, 1, 1, 2]]))
    assert own > 0
    assert without_scene_0.mean_ap[0] == pytest.approx(rest.mean_ap[0] + own / 10, abs=1e-9)
