"""The submission file: attributes and boxes as OpenPCDet writes them, round trip, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_problems import random_problem
from nuscenes.eval.common.loaders import load_prediction
from nuscenes.eval.detection.data_classes import DetectionBox

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import ATTRIBUTES, DETECTION_CLASSES
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Predictions
from cpq_train.evaluation.predictions import LidarDetections, assign_attributes, predictions_from_detections
from cpq_train.evaluation.submission import read_submission, write_submission

TOKENS = np.array([f"sample{i}" for i in range(4)])


def finite_predictions(num_boxes: int = 30) -> Predictions:
    predictions = random_problem(3, 1, num_boxes)[1]
    np.nan_to_num(predictions.boxes.velocity, copy=False)
    return predictions


def test_round_trip_is_exact(tmp_path: Path) -> None:
    predictions = finite_predictions()
    write_submission(tmp_path / "results.json", predictions, TOKENS)
    read = read_submission(tmp_path / "results.json", TOKENS)
    for name in predictions.boxes.__dataclass_fields__:
        np.testing.assert_array_equal(
            getattr(read.boxes, name), getattr(predictions.boxes, name), err_msg=name
        )
    np.testing.assert_array_equal(read.score, predictions.score)
    document = json.loads((tmp_path / "results.json").read_text())
    assert list(document["results"]) == TOKENS.tolist()
    flags = {
        "use_camera": False,
        "use_lidar": True,
        "use_radar": False,
        "use_map": False,
        "use_external": False,
    }
    assert document["meta"] == flags
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_samples_without_detections_are_written(tmp_path: Path) -> None:
    predictions = finite_predictions()
    write_submission(tmp_path / "results.json", predictions[predictions.boxes.sample == 2], TOKENS)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [bool(results[token]) for token in TOKENS] == [False, False, True, False]


def test_equals_openpcdet(golden_dir: Path, fake_index: NuScenesIndex) -> None:
    rows = fake_index.sample_rows("val")
    stored, golden = np.load(golden_dir / "golden_infos.npz"), {}
    submission = json.loads((golden_dir / "golden_submission.json").read_text())["results"]
    for position, row in enumerate(rows.tolist()):
        columns = (stored[f"det{position}_{name}"] for name in ("boxes_lidar", "scores", "labels"))
        boxes, scores, labels = columns
        golden[row] = LidarDetections(boxes, scores, labels - 1)
    predictions = predictions_from_detections(fake_index, rows, golden)
    for position, row in enumerate(rows.tolist()):
        mine = predictions[predictions.boxes.sample == position]
        theirs = submission[fake_index.sample_token(row)]
        for column, key in (("translation", "translation"), ("size", "size"), ("velocity", "velocity")):
            np.testing.assert_allclose(
                getattr(mine.boxes, column), [box[key] for box in theirs], rtol=0, atol=1e-4
            )
        dots = np.abs(np.sum(mine.boxes.rotation * [box["rotation"] for box in theirs], axis=1))
        np.testing.assert_allclose(dots, 1, rtol=0, atol=1e-6)
        for label, attribute, box in zip(mine.boxes.label, mine.boxes.attribute, theirs, strict=True):
            assert box["detection_name"] == DETECTION_CLASSES[label]
            if DETECTION_CLASSES[label] not in ("barrier", "traffic_cone"):
                assert box["attribute_name"] == ATTRIBUTES[attribute]


@pytest.mark.parametrize(
    ("name", "speed", "attribute"),
    [
        ("car", 0.3, "vehicle.moving"),
        ("car", 0.1, "vehicle.parked"),
        ("bus", 0.1, "vehicle.stopped"),
        ("construction_vehicle", 0.1, "vehicle.parked"),
        ("bicycle", 0.3, "cycle.with_rider"),
        ("motorcycle", 0.2, "cycle.without_rider"),
        ("pedestrian", 0.3, "pedestrian.moving"),
        ("pedestrian", 0.1, "pedestrian.standing"),
        ("barrier", 3.0, ""),
        ("traffic_cone", 0.0, ""),
    ],
)
def test_attribute_by_speed(name: str, speed: float, attribute: str) -> None:
    found = assign_attributes(np.array([DETECTION_CLASSES.index(name)]), np.array([[0.0, -speed]]))
    assert (ATTRIBUTES[found[0]] if found[0] >= 0 else "") == attribute


def test_at_most_500_boxes_the_best(mini_index: NuScenesIndex) -> None:
    rows, scores = mini_index.sample_rows("val")[:1], np.random.default_rng(0).random(700)
    boxes = np.tile([0, 0, 0, 4, 2, 1.5, 0, 0, 0], (700, 1))
    found = {int(rows[0]): LidarDetections(boxes, scores, np.zeros(700, int))}
    kept = predictions_from_detections(mini_index, rows, found).score
    assert len(kept) == 500
    assert kept.min() == np.sort(scores)[200]


def test_detections_of_other_samples_are_refused(mini_index: NuScenesIndex) -> None:
    rows = mini_index.sample_rows("val")
    none = LidarDetections(np.zeros((0, 9)), np.zeros(0), np.zeros(0, int))
    token = mini_index.sample_token(int(rows[4]))
    with pytest.raises(UserError, match=f"1 missing, 0 unknown, such as {token}; accepted: the 5 samples"):
        predictions_from_detections(mini_index, rows[:5], {int(row): none for row in rows[:4]})
    with pytest.raises(UserError, match=f"0 missing, 1 unknown, such as {token}"):
        predictions_from_detections(mini_index, rows[:4], {int(row): none for row in rows[:5]})


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        next(boxes for boxes in document["results"].values() if boxes)[0][key] = value

    return change


def _drop_sample(document: dict[str, Any]) -> None:
    del document["results"]["sample1"]


def _add_sample(document: dict[str, Any]) -> None:
    document["results"]["elsewhere"] = []


def _add_boxes(document: dict[str, Any]) -> None:
    boxes = next(boxes for boxes in document["results"].values() if boxes)
    boxes.extend([boxes[0]] * 500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_sample, "1 missing, such as sample1; accepted: exactly the 4 samples"),
        (_add_sample, "1 not of this split, such as elsewhere"),
        (_add_boxes, "detections; at most 500 are accepted"),
        (_set("detection_name", "tram"), "detection_name 'tram' is unknown; accepted: car, truck"),
        (_set("attribute_name", "flying"), "attribute_name 'flying' is unknown; accepted: cycle"),
        (
            _set("translation", [0.0, float("nan"), 0.0]),
            "translation of a detection is .*nan.*finite numbers",
        ),
        (_set("velocity", [float("inf"), 0.0]), "velocity of a detection is .*inf.*finite numbers"),
        (_set("detection_score", float("nan")), "detection_score of a detection is .nan."),
        (_set("size", [1.0, 1.0]), "size of a detection is no list of 3 numbers"),
        (_set("size", ["1.0", "1.0", "1.0"]), r"size of a detection is no list of 3 numbers: \['1.0'"),
        (_set("size", [[1.0], [1.0], [1.0]]), r"size of a detection is no list of 3 numbers: \[\[1.0"),
        (_set("size", [True, 1.0, 1.0]), r"size of a detection is no list of 3 numbers: \[True"),
        (_set("size", [None, 1.0, 1.0]), r"size of a detection is no list of 3 numbers: \[None"),
        (_set("size", [10**400, 1.0, 1.0]), r"size of a detection is no list of 3 numbers: \[1000"),
        (_set("size", {"0": 1.0}), "size of a detection is no list of 3 numbers: {"),
        (_set("size", "123"), "size of a detection is no list of 3 numbers: '123'"),
        (_set("detection_score", "0.5"), "detection_score of a detection is no number: '0.5'"),
        (_set("detection_score", [0.5]), r"detection_score of a detection is no number: \[0.5"),
        (_set("detection_score", True), "detection_score of a detection is no number: True"),
        (_set("detection_name", []), "detection_name .* is unknown"),
        (_set("rotation", "up"), "rotation of a detection is no list of 4 numbers"),
        (_set("sample_token", "sample9"), "a detection says sample_token 'sample9'"),
        (lambda document: document.pop("results"), "no submission; accepted"),
        (lambda document: document.pop("meta"), "no submission; accepted"),
        (lambda document: document["results"].update(sample0=None), "sample0: detections are None"),
        (
            lambda document: document["results"].update(sample0=["box"]),
            "sample0: detection 'box' lacks a key",
        ),
    ],
)
def test_bad_submissions(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_submission(path, finite_predictions(), TOKENS)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as error:
        read_submission(path, TOKENS)
    assert str(path) in str(error.value)


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: next(boxes for boxes in document["results"].values() if boxes)[0].pop(key)


def _of_devkit(path: Path) -> list[DetectionBox]:
    boxes: list[DetectionBox] = load_prediction(str(path), 500, DetectionBox)[0].all
    return boxes


@pytest.mark.parametrize(
    "change",
    [
        _set("velocity", [float("nan"), float("nan")]),
        _set("velocity", [float("nan"), 1.0]),
        _set("size", [0.0, 0.0, 0.0]),
        _set("size", [1, 2, 3]),
        _set("translation", [1, 2, 3]),
        _set("detection_score", 1),
        _set("detection_score", -1.0),
        _set("detection_score", 17.5),
        _drop("detection_score"),
        _set("num_pts", 3),
        _set("ego_translation", [1.0, 2.0, 0.0]),
        _set("instance", {"any": "thing"}),
        lambda document: document.update(meta={}),
        lambda document: document.update(meta=None, more=1),
    ],
)
def test_what_the_devkit_takes_is_taken_as_it_is(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    write_submission(path, finite_predictions(), TOKENS)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    ours, theirs = read_submission(path, TOKENS), _of_devkit(path)
    for name in ("translation", "size", "rotation", "velocity"):
        np.testing.assert_array_equal(getattr(ours.boxes, name), [getattr(box, name) for box in theirs])
    assert ours.score.tolist() == [box.detection_score for box in theirs]


def test_boxes_that_say_they_hold_no_points_do_not_count(tmp_path: Path) -> None:
    """nuscenes-devkit filters detections by `num_pts` as it does annotations."""
    path = tmp_path / "results.json"
    write_submission(path, finite_predictions(), TOKENS)
    whole, document = read_submission(path, TOKENS), json.loads(path.read_text())
    boxes = [box for boxes in document["results"].values() for box in boxes]
    for box, num_points in zip(boxes, (0, 1, 0, -1), strict=False):
        box["num_pts"] = num_points
    path.write_text(json.dumps(document))
    left = read_submission(path, TOKENS)
    assert left.score.tolist() == [whole.score[1], *whole.score[3:]]


@pytest.mark.parametrize(
    "change",
    [
        _add_boxes,
        _set("detection_name", "tram"),
        _set("attribute_name", "flying"),
        _set("translation", [0.0, float("nan"), 0.0]),
        _set("size", [float("nan"), 1.0, 1.0]),
        _set("rotation", [1.0, 0.0, float("nan"), 0.0]),
        _set("detection_score", float("nan")),
        _set("detection_score", None),
        _set("velocity", [1.0]),
        _drop("velocity"),
        _drop("attribute_name"),
        lambda document: document.pop("meta"),
        lambda document: document.pop("results"),
    ],
)
def test_what_the_devkit_refuses_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_submission(path, finite_predictions(), TOKENS)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises((AssertionError, KeyError, TypeError)):
        _of_devkit(path)
    with pytest.raises(UserError, match=r"accepted|is no list of 2 numbers|is no number: None"):
        read_submission(path, TOKENS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"meta": {}, "results": {"sample0": [], "sample0": []}}', "'sample0' occurs twice"),
        ("{", "is no JSON: .* line 1 column 2"),
        ('{"meta": ' + "[" * 100_000, "is no JSON: it is nested too deep"),
        ("[]", "no submission"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_submission(tmp_path / "results.json", TOKENS)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"submission .*absent\.json' does not exist"):
        read_submission(tmp_path / "absent.json", TOKENS)


@pytest.mark.parametrize(("name", "value"), [("velocity", np.nan), ("size", 0.0)])
def test_bad_predictions_are_not_written(name: str, value: float, tmp_path: Path) -> None:
    """Though they are read in those of others."""
    predictions = finite_predictions()
    getattr(predictions.boxes, name)[5] = value
    with pytest.raises(UserError, match=f"{name} of a detection"):
        write_submission(tmp_path / "results.json", predictions, TOKENS)
    assert not list(tmp_path.iterdir())
