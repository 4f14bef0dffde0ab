"""Scores of other classes than nuScenes' ten: the same numbers where the rules are the same."""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_problems import random_problem

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.boxes import GroundTruth, Predictions
from cpq_train.evaluation.countable import check_countable
from cpq_train.evaluation.devkit import check_devkit
from cpq_train.evaluation.ground_truth import ground_truth
from cpq_train.evaluation.lost_objects import changes, counts
from cpq_train.evaluation.matches import find_matches, read_matches, write_matches
from cpq_train.evaluation.matching import true_positive_errors
from cpq_train.evaluation.metric import evaluate
from cpq_train.evaluation.metrics_file import RunInfo, build_metrics, read_metrics, task_of, write_metrics
from cpq_train.evaluation.submission import read_submission, write_submission

NONE = Predictions(random_problem(0, 1, 1)[1].boxes[np.zeros(0, np.int64)], np.zeros(0))
ORDER = np.array([9, 3, 0, 1, 7, 8, 2, 5, 6, 4])
RULES = dict(zip(NUSCENES.names, NUSCENES.rules, strict=True))
RENAMED = DetectionTask.of({f"own_{NUSCENES.names[row]}": NUSCENES.rules[row] for row in ORDER})


def run_info(**kwargs: Any) -> RunInfo:
    dataset = {"root_name": "own", "version": "v1", "fingerprint": "f"}
    return RunInfo("float", "a.ckpt", "0" * 64, dataset, "val", "p", **kwargs)


def renamed(annotations: GroundTruth, predictions: Predictions) -> tuple[GroundTruth, Predictions]:
    new_id = np.argsort(ORDER)
    gt = replace(annotations.boxes, label=new_id[annotations.boxes.label])
    found = replace(predictions.boxes, label=new_id[predictions.boxes.label])
    return replace(annotations, boxes=gt, task=RENAMED), replace(predictions, boxes=found, task=RENAMED)


@pytest.mark.parametrize("seed", range(4))
def test_names_and_order_of_classes_change_no_number_but_there_is_no_nds(seed: int) -> None:
    problem = random_problem(seed, 300, 400, num_classes=10)
    usual, own = evaluate(*problem).scores, evaluate(*renamed(*problem)).scores
    np.testing.assert_array_equal(own.ap, usual.ap[ORDER])
    np.testing.assert_array_equal(own.errors, usual.errors[ORDER])
    assert own.mean_ap == pytest.approx(usual.mean_ap, abs=1e-15)
    assert usual.nds is not None
    assert own.nds is None
    assert own.headline == {"mAP": own.mean_ap}


def test_ranges_symmetry_and_errors_are_those_of_the_class() -> None:
    annotations, predictions = random_problem(1, 300, 400, num_classes=10)
    wide = {name: replace(rules, range_m=60.0, is_symmetric=False) for name, rules in RULES.items()}
    far = DetectionTask.of(wide)
    usual = evaluate(annotations, predictions)
    own = evaluate(replace(annotations, task=far), replace(predictions, task=far))
    assert len(own.matches.gt_label) > len(usual.matches.gt_label)
    boxes = replace(annotations.boxes, label=np.full(300, NUSCENES.names.index("barrier")))
    flat = replace(boxes, rotation=boxes.rotation * [1, 0, 0, 1])
    turned = replace(flat, rotation=flat.rotation[:, [3, 1, 2, 0]] * [-1, 1, 1, 1])  # half a turn about z
    for task, error in ((NUSCENES, 0.0), (far, np.pi)):
        np.testing.assert_allclose(true_positive_errors(flat, turned, task)[:, 2], error, atol=1e-9)


def test_files_of_own_classes(tmp_path: Path) -> None:
    annotations, predictions = renamed(*random_problem(2, 300, 400, num_classes=10))
    found = evaluate(annotations, predictions)
    document = build_metrics(run_info(), found.scores, found.matches)
    write_metrics(tmp_path / "metrics.json", document)
    read = read_metrics(tmp_path / "metrics.json")
    assert task_of(read, "here") == RENAMED
    assert list(read["per_class"]) == list(RENAMED.names)
    assert read["metrics"]["NDS"] is None
    assert read["confidence"]["NDS"] is None
    assert len(read["confidence"]["mAP"]) == 2
    write_matches(tmp_path / "matches.npz", found.matches)
    again = read_matches(tmp_path / "matches.npz", RENAMED)
    assert counts(changes(again, again))["class"].keys() == set(RENAMED.names)
    tokens = annotations.samples.tokens
    write_submission(tmp_path / "results_nusc.json", finite(predictions), tokens)
    results = json.loads((tmp_path / "results_nusc.json").read_text())["results"]
    assert {box["detection_name"] for boxes in results.values() for box in boxes} <= set(RENAMED.names)
    np.testing.assert_array_equal(
        read_submission(tmp_path / "results_nusc.json", tokens, RENAMED).boxes.label, predictions.boxes.label
    )
    with pytest.raises(UserError, match=r"detection_name 'own_.*' is unknown; accepted: car"):
        read_submission(tmp_path / "results_nusc.json", tokens)


def finite(predictions: Predictions) -> Predictions:
    velocity = np.nan_to_num(predictions.boxes.velocity)
    return replace(predictions, boxes=replace(predictions.boxes, velocity=velocity))


def test_an_nds_of_own_classes_is_refused(tmp_path: Path) -> None:
    annotations, predictions = renamed(*random_problem(2, 30, 40))
    found = evaluate(annotations, predictions)
    document = build_metrics(run_info(), found.scores, found.matches)
    document["metrics"]["NDS"] = 0.5
    with pytest.raises(UserError, match=r"metrics, NDS: got 0\.5"):
        write_metrics(tmp_path / "metrics.json", document)


def test_a_network_for_one_class_is_scored_over_it_beside_the_official_mean() -> None:
    annotations, predictions = random_problem(5, 300, 400, num_classes=10)
    car = predictions.boxes.label == 0
    found = evaluate(annotations, predictions[car])
    document = build_metrics(run_info(trained_classes=("car",)), found.scores, found.matches)
    ap = document["per_class"]["car"]["AP"]["mean"]
    assert ap > 0
    assert document["metrics"]["mAP"] == pytest.approx(ap / 10)
    assert document["trained"]["mAP"] == ap
    low, high = document["trained"]["confidence"]
    assert low <= ap <= high
    assert "trained" not in build_metrics(
        run_info(trained_classes=NUSCENES.names[::-1]), found.scores, found.matches
    )


def test_scenes_are_resampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, predictions = random_problem(5, 300, 400, num_classes=10)
    found, resample, calls = evaluate(annotations, predictions), bootstrap.resample, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return resample(*args)

    monkeypatch.setattr(bootstrap, "resample", counted)
    document = build_metrics(run_info(trained_classes=("car",)), found.scores, found.matches)
    assert document["trained"]["confidence"] is not None
    assert document["confidence"]["mAP"] is not None
    assert len(calls) == 1


def test_ground_truth_of_which_nothing_counts(mini_index: NuScenesIndex) -> None:
    rows = mini_index.sample_rows("mini_val")
    annotations = ground_truth(mini_index, rows)
    check_countable(mini_index, rows, annotations, "val")
    without = replace(annotations, num_points=np.zeros_like(annotations.num_points))
    with pytest.raises(
        UserError, match=r"of split 'val': of \d+ .* none counts: .*4441 have neither LiDAR nor radar points"
    ):
        check_countable(mini_index, rows, without, "val")
    near = DetectionTask.of({name: replace(rules, range_m=1.0) for name, rules in RULES.items()})
    with pytest.raises(UserError, match=r"\d+ lie beyond the range of their class; accepted"):
        check_countable(mini_index, rows, replace(annotations, task=near), "val")
    with pytest.raises(UserError, match=r"\d+ are of other classes \(categories of no class: "):
        check_countable(mini_index, rows, annotations[np.zeros(0, np.int64)], "val")


def test_classes_that_nothing_counts_of_are_named(mini_index: NuScenesIndex) -> None:
    rows = mini_index.sample_rows("mini_val")
    annotations = ground_truth(mini_index, rows)
    assert check_countable(mini_index, rows, annotations, "val") == [
        name for row, name in enumerate(NUSCENES.names) if row not in find_matches(annotations, NONE).gt_label
    ]


@pytest.mark.parametrize("change", [{"task": RENAMED}, {"lidar_channel": "LIDAR_FRONT"}])
def test_the_devkit_does_not_score_what_it_does_not_know(
    mini_index: NuScenesIndex, change: dict[str, Any]
) -> None:
    check_devkit(mini_index)
    other = copy(mini_index)
    other.__dict__.update(change)
    with pytest.raises(
        UserError, match=r"engine is 'devkit', which does not know data\..*; accepted: vectorised"
    ):
        check_devkit(other)
