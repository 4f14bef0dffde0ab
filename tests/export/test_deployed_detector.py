"""The runtime to copy, against the code of the package that it stands for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from bare_python import BarePython
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cpq_train.data.index import open_index
from cpq_train.data.points.format import NUSCENES_COLUMNS, PointFormat
from cpq_train.data.settings import DataSettings
from cpq_train.data.sweeps import (
    load_cloud,
    load_sweeps,
    previous_frames,
    read_cloud,
    sweep_transform,
    time_lag_s,
)
from cpq_train.data.voxelization import Voxelizer
from cpq_train.evaluation.predictions import LidarDetections, best_detections
from cpq_train.export import deployed_detector
from cpq_train.export.deployed_detector import DeployedDetector, DeploymentError, join_sweeps, read_sweeps
from cpq_train.export.sidecar import SCHEMA, Sidecar, read_sidecar, sidecar_path
from cpq_train.models.center_head import BOX_BRANCHES
from cpq_train.models.config import NetworkConfig
from cpq_train.models.decode import PostProcessing, decode

RANGE = (-3.2, -6.4, -5.0, 3.2, 6.4, 3.0)
NETWORK = NetworkConfig(
    point_cloud_range=RANGE,
    class_names=("bus", "car", "barrier"),
    class_groups=(("car",), ("barrier", "bus")),
)
WIDTH, HEIGHT = 8, 16
DATA = DataSettings(point_cloud_range=RANGE, max_points_per_voxel=10, max_num_voxels_eval=40)
POST = PostProcessing(max_objects_per_head=40, score_threshold=0.3, nms_pre=30, nms_post=12)

Heads = list[dict[str, np.ndarray]]


def channels(head: int) -> dict[str, int]:
    return {**BOX_BRANCHES, "hm": len(NETWORK.class_groups[head])}


def random_heads(seed: int, logits: list[float] | None = None, spread: float = 1.0) -> Heads:
    """Raw outputs; of a few logits many are equal, and boxes of a small spread are alike."""
    rng = np.random.default_rng(seed)
    heads = [
        {
            name: rng.normal(0, spread, (1, count, HEIGHT, WIDTH)).astype(np.float32)
            for name, count in c.items()
        }
        for c in map(channels, range(2))
    ]
    for head in heads if logits is not None else ():
        head["hm"] = rng.choice(np.array(logits, dtype=np.float32), head["hm"].shape)
    return heads


def model(heads: Heads) -> onnx.ModelProto:
    """A network that says the same of any voxels; where there are none, its heat maps say nothing."""
    named = [(f"head{i}.{name}", value) for i, head in enumerate(heads) for name, value in head.items()]
    nodes = [
        helper.make_node("Shape", ["voxel_features"], ["num"], end=1),
        helper.make_node("Shape", ["voxel_coords"], ["num_coords"], end=1),
        helper.make_node("Min", ["num", "num_coords", "one"], ["is_any"]),
        helper.make_node("Sub", ["one", "is_any"], ["is_none"]),
        helper.make_node("Cast", ["is_none"], ["none_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["none_float", "low"], ["drop"]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("low", TensorProto.FLOAT, [1], [-100.0]),
    ]
    for name, value in named:
        constants.append(helper.make_tensor(f"{name}.all", TensorProto.FLOAT, value.shape, value.ravel()))
        nodes.append(helper.make_node("Add", [f"{name}.all", "drop"], [name]))
    inputs = [
        helper.make_tensor_value_info("voxel_features", TensorProto.FLOAT, ["V", 5]),
        helper.make_tensor_value_info("voxel_coords", TensorProto.INT32, ["V", 3]),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in named]
    graph = helper.make_graph(nodes, "g", inputs, outputs[::-1], constants)  # order must not matter
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def export(
    folder: Path, heads: Heads, data: DataSettings = DATA, post: PostProcessing = POST, content: bytes = b""
) -> Path:
    path = folder / "net.onnx"
    content = content or model(heads).SerializeToString()
    path.write_bytes(content)
    geometry = NETWORK.geometry
    Sidecar(
        target="portable",
        file={"name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)},
        checkpoint={"path": "a.ckpt", "sha256": "0", "arm": "float", "parents": {}},
        scheme={},
        coverage={},
        versions={},
        inputs=[],
        outputs=[],
        class_names=list(NETWORK.class_names),
        head_map={"stride": geometry.stride, "width": geometry.width, "height": geometry.height},
        network=asdict(NETWORK),
        data=data.to_dict(),
        post_processing=asdict(post.reaching(NETWORK.point_cloud_range)),
    ).write(sidecar_path(path))
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("engine"), random_heads(0))


@pytest.fixture(scope="module")
def detector_with(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[DataSettings, PostProcessing], DeployedDetector]:
    content = model(random_heads(0)).SerializeToString()

    def make(data: DataSettings = DATA, post: PostProcessing = POST) -> DeployedDetector:
        folder = tmp_path_factory.mktemp("detector")
        return DeployedDetector(export(folder, [], data, post, content), num_threads=1)

    return make


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


def assert_same_voxels(detector: DeployedDetector, points: np.ndarray, data: DataSettings) -> None:
    features, cells = detector.voxelize(points)
    limits = data.max_points_per_voxel, data.max_num_voxels_eval
    expected, expected_cells, _ = Voxelizer(data.voxel_size, data.point_cloud_range, *limits)(points)
    np.testing.assert_array_equal(cells, expected_cells.numpy())
    np.testing.assert_array_equal(bits(features), bits(expected))
    assert (features.dtype, cells.dtype) == (np.float32, np.int32)


def crowded_points(rng: np.random.Generator, num_points: int, num_places: int) -> np.ndarray:
    """Points around some places, on faces of voxels and on and outside the borders too."""
    places = rng.uniform(-7, 7, (num_places, 3))
    points = np.empty((num_points, 5))
    points[:, :3] = places[rng.integers(num_places, size=num_points)] + rng.normal(0, 0.04, (num_points, 3))
    points[:, 3:] = rng.uniform(0, 255, num_points)[:, None] * [1, 0.002]
    aligned = rng.random(num_points) < 0.3
    steps = np.array(DATA.voxel_size)
    points[aligned, :3] = np.round(points[aligned, :3] / steps) * steps
    points[rng.random(num_points) < 0.05, :3] = RANGE[3:]
    points[rng.random(num_points) < 0.05, :3] = RANGE[:3]
    return points.astype(np.float32)


@pytest.mark.parametrize("max_points", [1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 20, 33, 64, 100, 260])
def test_voxels_have_the_same_bits(detector_with: Any, max_points: int) -> None:
    data = replace(DATA, max_points_per_voxel=max_points, max_num_voxels_eval=1000)
    detector = detector_with(data)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32), st.integers(0, 1500), st.sampled_from([1, 2, 20, 300]))
    def check(seed: int, num_points: int, num_places: int) -> None:
        rng = np.random.default_rng(seed)
        assert_same_voxels(detector, crowded_points(rng, num_points, num_places), data)

    check()


@pytest.mark.parametrize("max_points", [8, 20, 100])
def test_a_single_crowded_voxel(detector_with: Any, max_points: int) -> None:
    """torch and numpy sum a single row in orders of their own."""
    data = replace(DATA, max_points_per_voxel=max_points)
    detector = detector_with(data)
    rng = np.random.default_rng(0)
    for num_points in range(1, max_points + 3):
        points = rng.uniform(0.01, 0.09, (num_points, 5)).astype(np.float32)
        assert_same_voxels(detector, points, data)
        assert len(detector.voxelize(points)[0]) == 1


@pytest.mark.parametrize("num_features", [4, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("max_points", [3, 8, 20, 100])
def test_voxels_of_other_features_have_the_same_bits(
    detector_with: Any, max_points: int, num_features: int
) -> None:
    data = replace(DATA, max_points_per_voxel=max_points, max_num_voxels_eval=1000)
    detector, rng = detector_with(data), np.random.default_rng(num_features)
    for num_points, num_places in ((1, 1), (90, 1), (1500, 20), (1500, 300)):
        five = crowded_points(rng, num_points, num_places)
        further = rng.normal(0, 9, (num_points, num_features))
        points = np.column_stack([five[:, :3], further[:, 3:]]).astype(np.float32)
        assert_same_voxels(detector, points, data)


OTHER_COLUMNS = (
    ("x", "y", "z"),
    ("intensity", "z", "y", "x"),
    ("x", "y", "z", "intensity", "ring", "own"),
    ("x:float64", "_a:uint8", "y:float16", "z", "intensity:uint16", "time_lag:float64"),
)


@pytest.mark.parametrize("columns", OTHER_COLUMNS)
@pytest.mark.parametrize("ending", [".bin", ".npy"])
def test_clouds_of_other_columns_have_the_same_bits(
    tmp_path: Path, columns: tuple[str, ...], ending: str
) -> None:
    scale = 0.25 if any(one.startswith("intensity") for one in columns) else 1.0
    points = PointFormat(columns, scale)
    values = np.random.default_rng(0).uniform(0, 59, (41, len(columns))).astype(np.float32)
    if "ring" in columns:
        values[:, columns.index("ring")] = np.arange(41)
    path = tmp_path / f"a{ending}"
    if ending == ".npy":
        np.save(path, values)
    else:
        record = np.zeros(41, points.record)
        for name, column in zip(points.names, values.T, strict=True):
            record[name] = column
        record.tofile(path)
    found = deployed_detector.read_cloud(path, columns, scale)
    np.testing.assert_array_equal(bits(found), bits(read_cloud(path, points=points)))
    with pytest.raises(DeploymentError, match=r"accepted: (bytes, a multiple|\(points, )"):
        deployed_detector.read_cloud(path, (*columns, *(f"more{number}" for number in range(54))))


def test_the_sidecar_says_how_clouds_are_read(tmp_path: Path) -> None:
    data = replace(DATA, point_columns=("x", "y", "z", "intensity"), intensity_scale=255.0)
    assert DeployedDetector(
        export(tmp_path, [], data, content=model(random_heads(0)).SerializeToString())
    ).how == (
        ["x", "y", "z", "intensity"],
        255.0,
    )
    path = tmp_path / "net.json"
    sidecar = json.loads(path.read_text())
    for name in ("point_columns", "intensity_scale"):  # as files of earlier releases
        del sidecar["data"][name]
    path.write_text(json.dumps(sidecar))
    assert DeployedDetector(tmp_path / "net.onnx").how == (deployed_detector.NUSCENES, 1.0)


@pytest.mark.parametrize(
    "columns",
    [
        None,
        5,
        {},
        [],
        "xyzi",
        [1, 2, 3],
        ["x", "y", "z", None],
        ["a", "b", "c", "d"],
        ["x", "y", "z", "x"],
        ["x", "y", "z", "intensity:O"],
        ["x", "y", "z", "intensity:float99"],
        ["x", "y", "z", ""],
        ["x", "y", "z", "a b"],
    ],
)
def test_columns_that_are_none_are_refused(tmp_path: Path, columns: Any) -> None:
    engine = export(tmp_path, random_heads(0))
    edit_sidecar(engine, data={**DATA.to_dict(), "point_columns": columns})
    words = rf"^data\.point_columns: {re.escape(repr(columns))}; accepted: a list of x, y, z, others; name or"
    with pytest.raises(DeploymentError, match=words):
        DeployedDetector(engine)
    with pytest.raises(DeploymentError, match=words):
        deployed_detector.read_cloud(cloud_file(tmp_path, "a.bin"), columns)


@pytest.mark.parametrize("scale", [None, "a", [255]])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: Any) -> None:
    engine = export(tmp_path, random_heads(0))
    edit_sidecar(engine, data={**DATA.to_dict(), "intensity_scale": scale})
    with pytest.raises(DeploymentError, match=r"^settings in .*net\.json: (Type|Value)Error"):
        DeployedDetector(engine)


def test_clouds_of_other_columns_are_no_clouds(simulated_root: Path, tmp_path: Path) -> None:
    """Their bytes divide by what they are read as."""
    table = np.fromfile(next(simulated_root.glob("samples/LIDAR_TOP/*")), np.float32).reshape(-1, 5)
    table = table[: len(table) // 240 * 240]
    path = tmp_path / "a.bin"
    names = ("x", "y", "z", "intensity", "ring")
    for written in (3, 4, 5):
        for dtype in (np.float32, np.float64):
            table[:, :written].astype(dtype).tofile(path)
            for read in (3, 4, 5):
                if (written, dtype) == (read, np.float32):
                    assert len(deployed_detector.read_cloud(path, names[:read])) == len(table)
                elif read > 3:
                    with pytest.raises(DeploymentError, match=r"cloud .*a\.bin: (.* is odd in|NaN)"):
                        deployed_detector.read_cloud(path, names[:read])


ODD_VALUES = {
    "far": (0, 2000, r"x of \(.*\) is odd in 50% of points; accepted: \(-1000.0, 1000.0\)"),
    "negative": (3, -1, "intensity of .* is odd in"),
    "bright": (3, 300, r"intensity of .* is odd in .*; accepted: \(0, 256\)"),
    "between rings": (4, 0.5, r"ring of .* is odd in .*; accepted: \(0, 255\)"),
    "times": (5, 1.6e9, r"time_lag of .* is odd in .*; accepted: \(-60, 60\)"),
}


@pytest.mark.parametrize("name", ODD_VALUES)
@pytest.mark.parametrize("ending", [".bin", ".npy"])
def test_odd_values_are_refused_where_they_are_many(tmp_path: Path, name: str, ending: str) -> None:
    column, value, words = ODD_VALUES[name]
    columns, path = (*NUSCENES_COLUMNS, "time_lag"), tmp_path / f"a{ending}"
    for number in (1, 50):
        table = np.full((100, 6), 0.03, np.float32)
        table[:, 4] = 7
        table[:number, column] = value
        if ending == ".bin":
            table.tofile(path)
        else:
            np.save(path, table)
        if number == 1:
            assert deployed_detector.read_cloud(path, columns).shape == (100, 5)
        else:
            with pytest.raises(DeploymentError, match=rf"cloud .*a\{ending}: {words}"):
                deployed_detector.read_cloud(path, columns)


def test_an_array_of_no_numbers_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 5), "a"))
    with pytest.raises(DeploymentError, match=r"<U1 of shape \(4, 5\); accepted: \(points, 5\) of numbers"):
        deployed_detector.read_cloud(tmp_path / "a.npy")


def test_time_lags_of_points_are_added() -> None:
    points = np.full((2, 4), 5, np.float32)
    points[:, 3] = [0.25, 0.5]
    sweeps = [(points, np.eye(4), 0.0), (points, np.eye(4), 0.125)]
    for columns, expected in (
        (("x", "y", "z", "time_lag:float16"), [0.25, 0.5, 0.375, 0.625]),
        (("x", "y", "z", "time_lag_of_mine"), [0, 0, 0.125, 0.125]),
    ):
        np.testing.assert_array_equal(join_sweeps(sweeps, columns)[:, 3], np.float32(expected))


def test_voxels_beyond_the_cap_are_dropped(detector_with: Any) -> None:
    detector = detector_with()
    points = crowded_points(np.random.default_rng(1), 3000, 200)
    assert_same_voxels(detector, points, DATA)
    assert_same_voxels(detector, np.asfortranarray(points), DATA)
    assert len(detector.voxelize(points)[0]) == DATA.max_num_voxels_eval


@pytest.mark.parametrize("points", [np.zeros((0, 5), np.float32), np.full((4, 5), 99, np.float32)])
def test_no_point_in_the_grid(detector_with: Any, points: np.ndarray) -> None:
    detector = detector_with()
    assert_same_voxels(detector, points, DATA)
    assert detector.voxelize(points)[0].shape == (0, 5)
    assert detector(points).boxes.shape == (0, 9)


@pytest.mark.parametrize("num_sweeps", [1, 2, 6, 10])
def test_sweeps_have_the_same_bits(simulated_root: Path, tmp_path: Path, num_sweeps: int) -> None:
    index = open_index(simulated_root, "v1.0-trainval", tmp_path / "cache")
    for row in index.sample_rows("val")[:2].tolist():
        frames = [int(index.sample_frames[row]), *previous_frames(index, row, num_sweeps)]
        entries: list[dict[str, Any]] = [
            {
                "file": str(index.frame_path(frame)),
                # A frame that repeats the key frame is not moved.
                "matrix": np.eye(4).tolist()
                if frame == frames[0]
                else sweep_transform(index, row, frame).tolist(),
                "time_lag_s": time_lag_s(index, row, frame),
            }
            for frame in frames
        ]
        entries[0] = {"file": entries[0]["file"]}
        (tmp_path / "sweeps.json").write_text(json.dumps(entries))
        joined = join_sweeps(read_sweeps(tmp_path / "sweeps.json"))
        np.testing.assert_array_equal(bits(joined), bits(load_sweeps(index, row, num_sweeps)))
        whole = [np.fromfile(index.frame_path(frame), np.float32).reshape(-1, 5) for frame in frames]
        assert whole[0][:, 4].any()  # rings, which are no time lags
        again = [
            (cloud, *rest)
            for cloud, (_, *rest) in zip(whole, read_sweeps(tmp_path / "sweeps.json"), strict=True)
        ]
        np.testing.assert_array_equal(bits(join_sweeps(again)), bits(joined))
        single = deployed_detector.read_cloud(index.frame_path(frames[0]))
        np.testing.assert_array_equal(bits(single), bits(load_cloud(index, frames[0], row)))


def test_returns_from_the_vehicle_are_lost() -> None:
    points = np.zeros((4, 5), np.float32)
    points[:, :2] = [[1, 0], [0, -1], [0.999, -0.999], [-2, 0]]
    points[:, 4] = 31  # rings
    matrix = np.eye(4)
    matrix[0, 3] = 5
    joined = join_sweeps([(points, np.eye(4), 0.0), (points, matrix, 0.05)])
    np.testing.assert_array_equal(joined[:4, :2], points[:, :2])
    np.testing.assert_array_equal(joined[4:, :2], [[6, 0], [5, -1], [3, 0]])
    np.testing.assert_array_equal(joined[:, 4], np.float32([0] * 4 + [0.05] * 3))
    assert (points[:, 4] == 31).all()


def expected_detections(heads: Heads, post: PostProcessing) -> LidarDetections:
    tensors = [{name: torch.from_numpy(value) for name, value in head.items()} for head in heads]
    [found] = decode(tensors, NETWORK, post)
    return LidarDetections(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy())


def assert_same_boxes(found: deployed_detector.Detections, expected: LidarDetections) -> None:
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4, rtol=1e-6)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6, rtol=0)
    assert [column.dtype for column in found] == [np.float32, np.float32, np.int64]


POSTS = {
    "usual": POST,
    "all": PostProcessing(score_threshold=0.0, nms_iou=0.5, center_range=(-99, -99, -99, 99, 99, 99)),
    "few": replace(POST, max_objects_per_head=7, nms_pre=5, nms_post=2),
    "narrow": replace(POST, center_range=(-1.2, -2, -0.5, 2, 2.4, 0.5)),
    "little overlap": replace(POST, nms_iou=0.001, score_threshold=0.1),
    "all overlap": replace(POST, nms_iou=1.0),
    "nothing": replace(POST, score_threshold=1.0),
}


@pytest.mark.parametrize("name", POSTS)
def test_boxes_equal_those_of_the_package(detector_with: Any, name: str) -> None:
    detector, post = detector_with(DATA, POSTS[name]), POSTS[name]

    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(0, 2**32),
        st.sampled_from([None, [0.5], [-1.0, 0.0, 0.5], [-9.0, 3.0, 3.5, 4.0], [20.0, 40.0]]),
        st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]),
    )
    def check(seed: int, logits: list[float] | None, spread: float) -> None:
        heads = random_heads(seed, logits, spread)
        assert_same_boxes(detector.decode(heads), expected_detections(heads, post))

    check()


def test_boxes_at_right_angles_and_of_equal_edges(detector_with: Any) -> None:
    """Edges that coincide are where clipping goes wrong; IoUs of 0.2 and 0.5 fall on the threshold."""
    rng = np.random.default_rng(5)
    for name in ("usual", "all", "little overlap"):
        detector = detector_with(DATA, POSTS[name])
        for seed in range(6):
            heads = random_heads(seed, [-1.0, 0.0, 1.0, 2.0])
            for head in heads:
                shape = head["hm"].shape[2:]
                head["center"][:] = rng.choice([0.0, 0.5, 0.25], head["center"].shape)
                head["dim"][:] = np.log(rng.choice([0.8, 1.6, 4.0], head["dim"].shape))
                head["rot"][0] = np.moveaxis(
                    np.array([[1, 0], [0, 1], [-1, 0], [0.5, 0.5]])[rng.integers(4, size=shape)], -1, 0
                )
            assert_same_boxes(detector.decode(heads), expected_detections(heads, POSTS[name]))


def test_an_iou_on_the_threshold_suppresses_nothing(detector_with: Any) -> None:
    """A box of a quarter of the area inside another: rounding must not decide."""
    post = replace(POST, nms_iou=0.25)
    detector, rng = detector_with(DATA, post), np.random.default_rng(6)
    row, column = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    for yaw in rng.uniform(-4, 4, 60):
        heads = random_heads(7)
        for head in heads:
            head["center"][0] = 3.5 - column, 5.5 - row
            head["center_z"][:] = 0
            head["dim"][:] = 0
            head["dim"][0, 0, ::2] = np.log(4)
            head["rot"][0] = np.array([np.cos(yaw), np.sin(yaw)])[:, None, None]
        found = detector.decode(heads)
        assert_same_boxes(found, expected_detections(heads, post))
        assert found.boxes[:2, 3].tolist() in ([1, 4], [4, 1])
        assert len(found.scores) == 4


def test_the_faces_of_the_center_range_are_inside(detector_with: Any) -> None:
    post = POSTS["narrow"]
    heads = random_heads(8)
    for head in heads:
        head["center_z"] = np.random.default_rng(8).choice(
            np.float32([-0.5, 0.5, np.nextafter(np.float32(0.5), np.float32(1))]), head["center_z"].shape
        )
    found = detector_with(DATA, post).decode(heads)
    assert_same_boxes(found, expected_detections(heads, post))
    assert set(found.boxes[:, 2].tolist()) == {-0.5, 0.5}


def test_values_that_are_no_boxes(detector_with: Any) -> None:
    """Sizes beyond float32 and NaN come out as they do from the package."""
    heads = random_heads(3, [0.0, 1.0])
    for head in heads:
        head["dim"][0, :, ::3] = 200.0
        head["dim"][0, 0, 1::3] = np.nan
        head["hm"][0, 0, :, 5] = np.nan
        head["hm"][0, 0, :, 6] = np.inf
        head["hm"][0, 0, :, 7] = -np.inf
        head["center"][0, 0, 4] = np.nan
    found = detector_with().decode(heads)
    assert_same_boxes(found, expected_detections(heads, POST))
    assert len(found.scores)


def test_scores_have_nearly_always_the_same_bits(detector_with: Any) -> None:
    """Each step is rounded as torch does, so that scores keep their order."""
    post = PostProcessing(score_threshold=0.01, nms_iou=1.0, max_objects_per_head=500)
    detector, same, total = detector_with(DATA, post), 0, 0
    for seed in range(20):
        heads = random_heads(seed)
        found, expected = detector.decode(heads), expected_detections(heads, post)
        same += np.count_nonzero(found.scores == expected.scores)
        total += len(found.scores)
    assert same > 0.9 * total


def test_a_cloud_has_500_boxes_at_most(tmp_path: Path) -> None:
    post = replace(POSTS["all"], nms_iou=1.0, nms_post=1000, max_objects_per_head=300)
    heads = [
        {name: np.tile(value, (1, 1, 2, 1)) for name, value in head.items()}
        for head in random_heads(4, [0.0, 0.5, 1.0])
    ]
    found = DeployedDetector(export(tmp_path, heads, post=post), 1)(np.zeros((1, 5), np.float32))
    expected = best_detections(expected_detections(heads, post))
    assert len(found.scores) == 500
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)


def cloud_file(folder: Path, name: str, points: np.ndarray | None = None) -> Path:
    if points is None:
        points = crowded_points(np.random.default_rng(2), 50, 9)
        points[:, 4] = np.arange(50)
    points.astype(np.float32).tofile(folder / name)
    return folder / name


def edit_sidecar(engine: Path, **changes: Any) -> None:
    path = sidecar_path(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


ENGINE_ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no engine": (Path.unlink, r"engine file .*net\.onnx: No such file or directory; accepted: a readable"),
    "no sidecar": (lambda e: sidecar_path(e).unlink(), r"net\.json, which belongs to net\.onnx,: No such"),
    "no JSON": (
        lambda e: sidecar_path(e).write_text("{"),
        r"net\.json, .*JSONDecodeError.*; accepted: a readable file, as written by export",
    ),
    "a list": (lambda e: sidecar_path(e).write_text("[]"), r"net\.json, .*TypeError"),
    "damaged": (
        lambda e: e.write_bytes(b"x"),
        r"net\.json, SHA-256 of .*net\.onnx: '2d711642.*; accepted: '",
    ),
    "newer": (lambda e: edit_sidecar(e, schema=2), r"net\.json, schema: 2; accepted: 1"),
    "target": (lambda e: edit_sidecar(e, target="gpu"), r"net\.json, target: 'gpu'; accepted: 'portable'"),
    "settings": (
        lambda e: edit_sidecar(e, data={}),
        r"settings in .*net\.json: KeyError.'point_cloud_range'",
    ),
    "classes": (
        lambda e: edit_sidecar(e, class_names=["car"]),
        r"settings in .*: ValueError.*'barrier' is not",
    ),
    "no network": (
        lambda e: export(e.parent, [], content=b"no network"),
        rf"engine file .*net\.onnx with onnxruntime {onnxruntime.__version__}: Inval",
    ),
}


@pytest.mark.parametrize("name", ENGINE_ERRORS)
def test_an_engine_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    change, message = ENGINE_ERRORS[name]
    engine = export(tmp_path, random_heads(0))
    assert read_sidecar(engine).target == "portable"
    change(engine)
    with pytest.raises(DeploymentError, match=message) as caught:
        DeployedDetector(engine)
    assert "\n" not in str(caught.value)


def test_the_schema_is_the_one_that_is_written() -> None:
    document = {"schema": deployed_detector.SCHEMA, "branches": deployed_detector.BRANCHES}
    assert document == {"schema": SCHEMA, "branches": (*BOX_BRANCHES, "hm")}


def test_a_cloud_that_cannot_be_used(engine: Path, tmp_path: Path) -> None:
    path = cloud_file(tmp_path, "a.bin")
    np.testing.assert_array_equal(deployed_detector.read_cloud(path), read_cloud(path))
    content = path.read_bytes()
    for size in (0, 993):
        path.write_bytes(content[:size])
        with pytest.raises(
            DeploymentError, match=rf"a\.bin: uint8 of shape \({size},\); accepted: bytes, a multiple of 20"
        ):
            deployed_detector.read_cloud(path)
    points = np.frombuffer(content, np.float32).reshape(-1, 5).copy()
    points[17, 3] = np.nan
    message = "NaN or infinite values in 1 of 50 points, first in 17; accepted: finite numbers"
    with pytest.raises(DeploymentError, match=rf"cloud .*a\.bin: {message}"):
        deployed_detector.read_cloud(cloud_file(tmp_path, "a.bin", points))
    detector = DeployedDetector(engine)
    with pytest.raises(DeploymentError, match=message):
        detector(points)
    with pytest.raises(DeploymentError, match=r"shape \(50, 4\); accepted: \(points, 5\)"):
        detector(points[:, :4])
    with pytest.raises(DeploymentError, match=r"cloud .*b\.bin: No such file"):
        deployed_detector.read_cloud(tmp_path / "b.bin")


EYE = np.eye(4).tolist()
SWEEPS_ERRORS: dict[str, tuple[Any, str]] = {
    "empty": ([], "IndexError"),
    "no list": ({"file": "a.bin"}, "KeyError"),
    "names": (["a.bin"], "TypeError"),
    "no file": ([{}], "KeyError.'file'"),
    "no matrix": ([{"file": "a.bin"}, {"file": "a.bin", "time_lag_s": 0.05}], "KeyError.'matrix'"),
    "no lag": ([{"file": "a.bin"}, {"file": "a.bin", "matrix": EYE}], "KeyError.'time_lag_s'"),
    "shape": ([{"file": "a.bin"}, {"file": "a.bin", "matrix": [1], "time_lag_s": 0}], "ValueError"),
    "key frame last": (
        [{"file": "a.bin", "matrix": np.roll(EYE, 1, 0).tolist(), "time_lag_s": 0.05}, {"file": "a.bin"}],
        "KeyError",
    ),
    "moved key frame": (
        [{"file": "a.bin", "matrix": [[1, 0, 0, 5], *EYE[1:]]}],
        "sweep 0: .*none for the key",
    ),
    "by columns": (
        [{"file": "a.bin"}, {"file": "a.bin", "matrix": [*EYE[:3], [5, 0, 0, 1]], "time_lag_s": 0.05}],
        "matrix of sweep 1: .*0 0 0 1",
    ),
    "no cloud": ([{"file": "b.bin"}], r"cloud .*b\.bin: No such file"),
}


@pytest.mark.parametrize("name", SWEEPS_ERRORS)
def test_sweeps_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    entries, message = SWEEPS_ERRORS[name]
    cloud_file(tmp_path, "a.bin")
    (tmp_path / "sweeps.json").write_text(json.dumps(entries))
    with pytest.raises(DeploymentError, match=rf"^(sweeps file .*sweeps\.json.*)?{message}"):
        read_sweeps(tmp_path / "sweeps.json")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> BarePython:
    return BarePython(tmp_path_factory.mktemp("bare"))


@pytest.mark.parametrize("name", ["torch", "spconv", "cpq_train", "onnx", "scipy"])
def test_the_bare_python_is_bare(bare: BarePython, name: str) -> None:
    done = bare(["-c", f"import {name}"])
    assert done.returncode == 1
    assert f"No module named '{name}'" in done.stderr


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder with two clouds and a sweeps file, and an engine beside."""
    engine = export(tmp_path, random_heads(0))
    cloud_file(tmp_path, "a.bin")
    cloud_file(tmp_path, "far.bin", np.full((3, 5), 99.0))
    matrix = np.eye(4)
    matrix[0, 3] = -0.5
    sweep = {"file": "a.bin", "matrix": matrix.tolist(), "time_lag_s": 0.05}
    (tmp_path / "sweeps.json").write_text(json.dumps([{"file": "a.bin"}, sweep]))
    return tmp_path, engine


def test_command_line_writes_boxes(bare: BarePython, drive: tuple[Path, Path]) -> None:
    folder, engine = drive
    clouds, output = [folder / "a.bin", folder / "far.bin"], folder / "boxes.json"
    done = bare.detect([engine, "--clouds", *clouds, "--output", output])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    document = json.loads(output.read_text())
    assert list(document) == ["schema", "engine", "results"]
    sha256 = hashlib.sha256(engine.read_bytes()).hexdigest()
    assert document["schema"] == 1
    assert document["engine"]["name"] == "net.onnx"
    assert document["engine"]["sha256"] == sha256
    assert document["engine"]["onnxruntime"] == onnxruntime.__version__
    assert list(document["results"]) == [str(cloud) for cloud in clouds]
    found, none = document["results"].values()
    assert none == []
    expected = expected_detections(random_heads(0), POST)
    assert [record["name"] for record in found] == [NETWORK.class_names[label] for label in expected.labels]
    np.testing.assert_allclose([record["box"] for record in found], expected.boxes, atol=1e-4)
    np.testing.assert_allclose([record["score"] for record in found], expected.scores, atol=1e-6)


def test_command_line_joins_sweeps_and_prints(bare: BarePython, drive: tuple[Path, Path]) -> None:
    folder, engine = drive
    done = bare.detect([engine, "--sweeps", folder / "sweeps.json"])
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    expected = expected_detections(random_heads(0), POST)
    assert lines[0].startswith(f"{folder / 'sweeps.json'}: {len(expected.scores)} boxes")
    for line, box, score, label in zip(lines[1:], *expected, strict=True):
        name, *numbers = line.split()
        assert name == NETWORK.class_names[label]
        assert [float(number) for number in numbers] == pytest.approx([score, *box.tolist()], abs=0.006)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clouds", "missing.bin"], "error: cloud missing.bin: No such file or directory; accepted: "),
        (["--sweeps", "missing.json"], "error: sweeps file missing.json: No such file"),
        (
            ["--clouds", "{folder}/a.bin", "--output", "no/boxes.json"],
            "error: [Errno 2] No such file or directory: 'no/boxes.json'",
        ),
    ],
)
def test_a_mistake_is_one_line(
    bare: BarePython, drive: tuple[Path, Path], arguments: list[str], message: str
) -> None:
    folder, engine = drive
    done = bare.detect([engine, *(argument.format(folder=folder) for argument in arguments)])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_clouds_or_sweeps(bare: BarePython, drive: tuple[Path, Path]) -> None:
    done = bare.detect([drive[1]])
    assert done.returncode == 2
    assert "one of the arguments --clouds --sweeps is required" in done.stderr
