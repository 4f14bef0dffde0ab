"""`metrics.json` and `matches.npz`: what they hold, round trips, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_problems import random_problem

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation.matches import Matches, read_matches, write_matches
from cpq_train.evaluation.metric import Evaluation, curves, evaluate, scores
from cpq_train.evaluation.metrics_file import RunInfo, build_metrics, read_metrics, write_metrics

DATASET = {"root_name": "data", "version": "v1.0-mini", "fingerprint": "f" * 64}


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(*random_problem(5, 150, 300, num_classes=10, num_samples=6, num_scenes=3))


@pytest.fixture(scope="module")
def document(evaluation: Evaluation) -> dict[str, Any]:
    run = RunInfo("qat", "last.ckpt", "abc", DATASET, "val", "def", coverage={"sparse": (20, 21)})
    return build_metrics(run, evaluation.scores, evaluation.matches)


def test_document_says_the_scores(document: dict[str, Any], evaluation: Evaluation) -> None:
    found = evaluation.scores
    assert document["metrics"]["mAP"] == found.mean_ap
    assert document["metrics"]["NDS"] == found.nds
    assert document["metrics"]["mAOE"] == found.mean_errors[2]
    assert document["dataset"] == {**DATASET, "split": "val", "num_samples": 6}
    for label, name in enumerate(DETECTION_CLASSES):
        ap = document["per_class"][name]["AP"]
        assert list(ap) == ["0.5", "1.0", "2.0", "4.0", "mean"]
        assert ap["2.0"] == found.ap[label, 2]
        assert ap["mean"] == pytest.approx(found.ap[label].mean(), abs=1e-15)
    cone, barrier = document["per_class"]["traffic_cone"], document["per_class"]["barrier"]
    assert [cone[error] is None for error in ("ATE", "ASE", "AOE", "AVE", "AAE")] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert [barrier[error] is None for error in ("AOE", "AVE", "AAE")] == [False, True, True]
    assert list(document["per_range"]) == ["0-20", "20-30", "30-40", "40-50"]
    for metric in ("mAP", "NDS"):
        lower, upper = document["confidence"][metric]
        assert lower < upper
    assert "3 scenes" in document["confidence"]["method"]


def test_round_trip(document: dict[str, Any], tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json", document)
    assert read_metrics(tmp_path / "metrics.json") == document
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_one_scene_has_no_interval() -> None:
    found = evaluate(*random_problem(5, 50, 100, num_scenes=1))
    run = RunInfo("float", "last.ckpt", "abc", DATASET, "val", "def")
    confidence = build_metrics(run, found.scores, found.matches)["confidence"]
    assert confidence["mAP"] is None
    assert "1 scene" in confidence["method"]


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", value=2), "schema is 2; accepted: 1"),
        (_set("arm", value="int8"), "arm: got 'int8', accepted: float, float_tuned, ptq, qat, dep"),
        (_set("metrics", "NDS", value=math.nan), "metrics, NDS: got nan, accepted: a finite number"),
        (_set("metrics", value={"mAP": 1.0}), "metrics: needs 'NDS', and has mAP"),
        (_set("per_class", "car", "AP", "2.0", value="high"), r"per_class, car, AP, 2\.0: got 'high'"),
        (_set("dataset", "num_samples", value=0), "dataset, num_samples: got 0, accepted: a count above 0"),
        (
            _set("confidence", "mAP", value=[0.5]),
            r"confidence, mAP: got \[0\.5\], accepted: null or",
        ),
        (_set("coverage", value={"sparse": 20}), "coverage: got .*accepted: a mapping of kind"),
        (_set("parents", value=[]), r"parents: got \[\], accepted: a mapping"),
        (lambda document: document.pop("postprocessing_sha256"), "needs 'postprocessing_sha256'"),
    ],
)
def test_bad_documents(
    document: dict[str, Any], change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    changed = json.loads(json.dumps(document))
    change(changed)
    with pytest.raises(UserError, match=message):
        write_metrics(tmp_path / "metrics.json", changed)
    (tmp_path / "metrics.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        read_metrics(tmp_path / "metrics.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_other_files_are_no_metrics(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_metrics(tmp_path / "metrics.json")


def test_scores_can_be_computed_again_from_matches(evaluation: Evaluation, tmp_path: Path) -> None:
    write_matches(tmp_path / "matches.npz", evaluation.matches)
    read = read_matches(tmp_path / "matches.npz")
    for name in Matches.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(read, name), getattr(evaluation.matches, name), err_msg=name)
    again = scores(curves(read))
    np.testing.assert_array_equal(again.ap, evaluation.scores.ap)
    np.testing.assert_array_equal(again.errors, evaluation.scores.errors)


def test_bad_matches(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    with pytest.raises(UserError, match=r"matches\.npz' does not exist"):
        read_matches(path)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"matches\.npz' is not a readable"):
        read_matches(path)
    np.savez(path, schema=1, pred_score=np.zeros(3))
    with pytest.raises(UserError, match=r"columns .*gt_label.* are missing"):
        read_matches(path)
