"""The copied runtime, where there are only numpy and onnxruntime, against `predict` on the same files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bare_python import BarePython
from exported_files import DATA, stating
from old_files import small_options

from cpq_train.common.detection_task import NUSCENES
from cpq_train.data.clouds import batch_of_clouds
from cpq_train.data.dataset import SampleConfig
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.settings import DataSettings
from cpq_train.data.sweeps import load_sweeps, previous_frames, sweep_transform, time_lag_s
from cpq_train.evaluation.predictions import (
    LidarDetections,
    predictions_from_detections,
    predictions_in_lidar_frame,
)
from cpq_train.evaluation.submission import LIDAR_ONLY, write_submission
from cpq_train.export.deployed_detector import DeployedDetector, join_sweeps, read_sweeps
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network whose boxes are so large that they overlap."""
    path = stating(tmp_path_factory.mktemp("checkpoint"), "qat")
    content = torch.load(path, weights_only=True)
    for head in range(2):
        content["state_dict"][f"network.dense_head.heads_list.{head}.dim.1.bias"] += 1.4
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def drive(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the engine, and the runtime that export wrote beside it."""
    folder = tmp_path_factory.mktemp("drive")
    main(["export", str(checkpoint), "--output", str(folder / "net.onnx"), "--with_runtime"])
    return folder


@pytest.fixture(scope="module")
def bare(drive: Path, tmp_path_factory: pytest.TempPathFactory) -> BarePython:
    python = BarePython(tmp_path_factory.mktemp("bare"))
    python.runtime = drive / "deployed_detector.py"
    return python


@pytest.fixture(scope="module")
def index(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> NuScenesIndex:
    return open_index(simulated_root, "v1.0-trainval", tmp_path_factory.mktemp("index"))


def found_by(bare: BarePython, drive: Path, output: Path, *inputs: str | Path) -> dict[str, Records]:
    done = bare.detect([drive / "net.onnx", *inputs, "--output", output])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return dict(json.loads(output.read_text())["results"])


def as_detections(records: Records) -> LidarDetections:
    labels = [CLASSES.index(record["name"]) for record in records]
    boxes = np.array([record["box"] for record in records])
    return LidarDetections(boxes, np.array([record["score"] for record in records]), np.array(labels))


CLASSES = list(CenterPointDetector().network_config.class_names)


def submitted(path: Path) -> dict[str, Records]:
    return dict(json.loads(path.read_text())["results"])


def assert_same_submissions(ours: Records, theirs: Records) -> None:
    """Boxes of a submission within 1e-4 m and their scores within 1e-6, in the same order."""
    assert len(ours) == len(theirs) > 50
    for name in ("detection_name", "attribute_name"):
        assert [box[name] for box in ours] == [box[name] for box in theirs]
    for name, tolerance in (
        ("translation", 1e-4),
        ("size", 1e-4),
        ("rotation", 1e-5),
        ("velocity", 1e-4),
        ("detection_score", 1e-6),
    ):
        np.testing.assert_allclose(
            [box[name] for box in theirs], [box[name] for box in ours], rtol=0, atol=tolerance
        )


def test_clouds(
    bare: BarePython, drive: Path, checkpoint: Path, simulated_root: Path, tmp_path: Path
) -> None:
    """Crowded voxels among them, which lose points."""
    clouds = [str(path) for path in sorted((simulated_root / "samples/LIDAR_TOP").iterdir())[:3]]
    options = [*small_options(simulated_root, tmp_path / "run"), "--data.root", "null"]
    main(["predict", *options, "--model.weights", str(checkpoint), "--clouds", *clouds])
    expected = submitted(tmp_path / "run/predictions.json")
    found = found_by(bare, drive, tmp_path / "boxes.json", "--clouds", *clouds)
    assert list(found) == list(expected) == clouds
    predictions = predictions_in_lidar_frame([as_detections(found[cloud]) for cloud in clouds], NUSCENES)
    write_submission(tmp_path / "found.json", predictions, np.array(clouds), LIDAR_ONLY)
    for cloud, boxes in submitted(tmp_path / "found.json").items():
        assert_same_submissions(expected[cloud], boxes)


def sweeps_file(index: NuScenesIndex, row: int, num_sweeps: int, path: Path) -> Path:
    """What the tables say of a sample's sweeps."""
    key_frame = int(index.sample_frames[row])
    entries: list[dict[str, Any]] = [{"file": str(index.frame_path(key_frame))}]
    for frame in previous_frames(index, row, num_sweeps):
        matrix = np.eye(4) if frame == key_frame else sweep_transform(index, row, frame)
        lag = time_lag_s(index, row, frame)
        entries.append({"file": str(index.frame_path(frame)), "matrix": matrix.tolist(), "time_lag_s": lag})
    path.write_text(json.dumps(entries))
    return path


def test_a_sample_with_sweeps(
    bare: BarePython, drive: Path, checkpoint: Path, index: NuScenesIndex, tmp_path: Path
) -> None:
    """Points in the order of their sweeps, as no data set has them: `predict` shuffles."""
    row = int(index.sample_rows("val")[1])
    file = sweeps_file(index, row, DATA["num_sweeps"], tmp_path / "sweeps.json")
    (found,) = found_by(bare, drive, tmp_path / "boxes.json", "--sweeps", file).values()
    points = load_sweeps(index, row, DATA["num_sweeps"])
    config = SampleConfig.of_evaluation(DataSettings(**DATA))
    detector = CenterPointDetector.load_from_checkpoint(checkpoint).eval()
    with torch.inference_mode():
        (expected,) = detector.detect(batch_of_clouds([points], config, ["a"]))
    names = [CLASSES[label] for label in expected.labels.tolist()]
    assert [record["name"] for record in found] == names
    assert len(names) > 50
    np.testing.assert_allclose([record["box"] for record in found], expected.boxes, rtol=0, atol=1e-4)
    np.testing.assert_allclose([record["score"] for record in found], expected.scores, rtol=0, atol=1e-6)


def test_samples_as_predict_shuffles_them(
    drive: Path, checkpoint: Path, index: NuScenesIndex, simulated_root: Path, tmp_path: Path
) -> None:
    """Through the Python interface, which takes points in any order."""
    rows = index.sample_rows("val")[1:3]
    tokens = [index.sample_token(int(row)) for row in rows]
    options = [*small_options(simulated_root, tmp_path / "run"), "--data.test_split", "val"]
    tokens_option = ["--data.sample_tokens", json.dumps(tokens)]
    main(["predict", *options, "--model.weights", str(checkpoint), *tokens_option])
    expected = submitted(tmp_path / "run/predictions.json")
    runtime, found = DeployedDetector(drive / "net.onnx", num_threads=1), {}
    for row in rows.tolist():
        file = sweeps_file(index, row, DATA["num_sweeps"], tmp_path / "sweeps.json")
        points = join_sweeps(read_sweeps(file))
        order = np.random.default_rng([0, row]).permutation(len(points))
        found[row] = as_detections(runtime.records(runtime(points[order])))
    predictions = predictions_from_detections(index, rows, found)
    write_submission(tmp_path / "found.json", predictions, np.array(tokens), LIDAR_ONLY)
    boxes = submitted(tmp_path / "found.json")
    assert boxes.keys() == expected.keys()
    for token in tokens:
        assert_same_submissions(expected[token], boxes[token])
