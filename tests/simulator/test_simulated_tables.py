"""The devkit opens a simulated root, its tables hang together, and its own evaluation scores it."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.nuscenes import BIKE_RACK_CATEGORY, CATEGORY_TO_CLASS, DETECTION_CLASSES
from cpq_train.simulator.geometry import rectangles_overlap


def _points(nusc: Any, sample: dict[str, Any]) -> np.ndarray:
    path = nusc.get_sample_data_path(sample["data"]["LIDAR_TOP"])
    return np.fromfile(path, np.float32).reshape(-1, 5)


def _sensor_boxes(nusc: Any, sample: dict[str, Any]) -> list[Any]:
    return nusc.get_sample_data(sample["data"]["LIDAR_TOP"])[1]


def test_all_tables_are_there(mini_root: Path, nusc: Any) -> None:
    assert len(list((mini_root / "v1.0-mini").glob("*.json"))) == 13
    assert [scene["name"] for scene in nusc.scene] == ["scene-0061", "scene-0553", "scene-0103"]
    assert {category["name"] for category in nusc.category} >= set(CATEGORY_TO_CLASS)
    assert all(Path(nusc.dataroot, record["filename"]).is_file() for record in nusc.map)


def test_tokens_are_unique_and_resolve(nusc: Any) -> None:
    for table in nusc.table_names:
        tokens = [row["token"] for row in getattr(nusc, table)]
        assert len(set(tokens)) == len(tokens), table
    for annotation in nusc.sample_annotation:
        nusc.get("instance", annotation["instance_token"])
        nusc.get("visibility", annotation["visibility_token"])
        assert all(nusc.get("attribute", token) for token in annotation["attribute_tokens"])


def test_samples_form_chains_at_2_hz(nusc: Any) -> None:
    for scene in nusc.scene:
        token, times = scene["first_sample_token"], []
        while token:
            sample = nusc.get("sample", token)
            assert nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["timestamp"] == sample["timestamp"]
            times.append(sample["timestamp"])
            last, token = token, sample["next"]
        assert len(times) == scene["nbr_samples"] == 3
        assert last == scene["last_sample_token"]
        np.testing.assert_allclose(np.diff(times), 500_000, atol=1000)


def test_every_key_frame_has_nine_past_sweeps_at_20_hz(nusc: Any) -> None:
    for sample in nusc.sample:
        sweep = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        times = [sweep["timestamp"]]
        for _ in range(9):
            assert nusc.get("sample_data", sweep["prev"])["next"] == sweep["token"]
            sweep = nusc.get("sample_data", sweep["prev"])
            times.append(sweep["timestamp"])
            assert nusc.get("ego_pose", sweep["ego_pose_token"])["timestamp"] == sweep["timestamp"]
        np.testing.assert_allclose(np.diff(times), -50_000, atol=1000)


def test_instances_count_their_annotations(nusc: Any) -> None:
    for instance in nusc.instance:
        token, chain = instance["first_annotation_token"], []
        while token:
            annotation = nusc.get("sample_annotation", token)
            assert annotation["instance_token"] == instance["token"]
            assert annotation["prev"] == (chain[-1] if chain else "")
            chain.append(token)
            token = annotation["next"]
        assert chain[-1] == instance["last_annotation_token"]
        assert len(chain) == instance["nbr_annotations"]
    assert sum(instance["nbr_annotations"] for instance in nusc.instance) == len(nusc.sample_annotation)


def test_lidar_points_are_counted_exactly(nusc: Any) -> None:
    from nuscenes.utils.geometry_utils import points_in_box

    for sample in nusc.sample:
        xyz = _points(nusc, sample)[:, :3].T.astype(np.float64)
        for box in _sensor_boxes(nusc, sample):
            counted = int(points_in_box(box, xyz).sum())
            assert counted == nusc.get("sample_annotation", box.token)["num_lidar_pts"], box.name


def test_attributes_follow_the_motion(nusc: Any) -> None:
    attribute = {row["token"]: row["name"] for row in nusc.attribute}
    num_checked = 0
    for annotation in nusc.sample_annotation:
        names = [attribute[token] for token in annotation["attribute_tokens"]]
        name = CATEGORY_TO_CLASS.get(annotation["category_name"])
        assert len(names) == (0 if name in (None, "barrier", "traffic_cone") else 1)
        velocity = nusc.box_velocity(annotation["token"])[:2]
        if names and not names[0].startswith("cycle.") and np.isfinite(velocity).all():
            assert names[0].endswith(".moving") == (np.hypot(*velocity) > 0.2)
            num_checked += 1
    assert num_checked > 100


def test_velocity_points_where_a_car_heads(nusc: Any) -> None:
    from pyquaternion import Quaternion

    num_moving = 0
    for annotation in nusc.sample_annotation:
        velocity = nusc.box_velocity(annotation["token"])
        if annotation["category_name"] == "vehicle.car" and np.linalg.norm(velocity) > 1:
            heading = Quaternion(annotation["rotation"]).rotate(np.array([1.0, 0, 0]))
            assert heading @ velocity / np.linalg.norm(velocity) > 0.95
            num_moving += 1
    assert num_moving > 10


def test_hidden_objects_have_low_visibility(nusc: Any) -> None:
    points = defaultdict(list)
    for annotation in nusc.sample_annotation:
        if annotation["category_name"] == "vehicle.car":
            points[annotation["visibility_token"]].append(annotation["num_lidar_pts"])
    assert set(points) == {"1", "2", "3", "4"}
    assert np.mean(points["1"]) < np.mean(points["4"])


def test_boxes_do_not_overlap(nusc: Any) -> None:
    for sample in nusc.sample:
        boxes = [box for box in nusc.get_boxes(sample["data"]["LIDAR_TOP"]) if box.name != BIKE_RACK_CATEGORY]
        poses = np.array([[*box.center[:2], box.orientation.yaw_pitch_roll[0]] for box in boxes])
        halves = np.array([[box.wlh[1], box.wlh[0]] for box in boxes]) / 2
        for n in range(len(boxes) - 1):
            assert not rectangles_overlap(poses[n], halves[n], poses[n + 1 :], halves[n + 1 :]).any()


def test_boxes_stand_on_the_ground(nusc: Any) -> None:
    """Near a car, the lowest points lie at the bottom of its box."""
    gaps = []
    for sample in nusc.sample:
        xyz = _points(nusc, sample)[:, :3]
        for box in _sensor_boxes(nusc, sample):
            around = np.hypot(*(xyz[:, :2] - box.center[:2]).T) < 4
            if box.name == "vehicle.car" and np.hypot(*box.center[:2]) < 15 and around.sum() > 50:
                bottom = box.bottom_corners()[2].mean()
                gaps.append(np.percentile(xyz[around, 2], 2) - bottom)
    assert len(gaps) > 5
    assert abs(np.median(gaps)) < 0.1


@pytest.mark.parametrize("name", DETECTION_CLASSES)
def test_every_scene_shows_every_class(nusc: Any, name: str) -> None:
    scenes = {
        nusc.get("sample", annotation["sample_token"])["scene_token"]
        for annotation in nusc.sample_annotation
        if CATEGORY_TO_CLASS.get(annotation["category_name"]) == name and annotation["num_lidar_pts"] > 0
    }
    assert len(scenes) == len(nusc.scene)


def test_a_perfect_submission_scores_one(nusc: Any, tmp_path: Path) -> None:
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    results = {
        sample["token"]: [_answer(nusc, token) for token in sample["anns"] if _is_scored(nusc, token)]
        for sample in nusc.sample
        if nusc.get("scene", sample["scene_token"])["name"] == "scene-0103"
    }
    meta = dict.fromkeys(("use_camera", "use_lidar", "use_radar", "use_map", "use_external"), False)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"meta": meta, "results": results}))
    evaluation = DetectionEval(
        nusc, config_factory("detection_cvpr_2019"), str(file), "mini_val", str(tmp_path), verbose=False
    )
    metrics, _ = evaluation.evaluate()
    scored = {box.detection_name for box in evaluation.gt_boxes.all}
    assert len(scored) >= 9
    assert metrics.mean_ap == pytest.approx(len(scored) / 10, abs=1e-9)
    assert metrics.tp_errors["trans_err"] == pytest.approx((10 - len(scored)) / 10, abs=1e-9)


def _is_scored(nusc: Any, token: str) -> bool:
    annotation = nusc.get("sample_annotation", token)
    return annotation["category_name"] in CATEGORY_TO_CLASS and annotation["num_lidar_pts"] > 0


def _answer(nusc: Any, token: str) -> dict[str, Any]:
    annotation = nusc.get("sample_annotation", token)
    attributes = [nusc.get("attribute", name)["name"] for name in annotation["attribute_tokens"]]
    return {
        "sample_token": annotation["sample_token"],
        "translation": annotation["translation"],
        "size": annotation["size"],
        "rotation": annotation["rotation"],
        "velocity": np.nan_to_num(nusc.box_velocity(token)[:2]).tolist(),
        "detection_name": CATEGORY_TO_CLASS[annotation["category_name"]],
        "detection_score": 0.9,
        "attribute_name": attributes[0] if attributes else "",
    }
