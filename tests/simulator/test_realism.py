"""Simulated clouds beside real ones of the same sensor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.nuscenes import CATEGORY_TO_CLASS
from cpq_train.simulator.geometry import quaternion_to_matrix

RANGE_EDGES_M = np.concatenate([[0.0, 1.0], np.arange(5.0, 75.0, 5.0), [np.inf]])
FINE_EDGES_M = np.concatenate([np.arange(9.0), [10, 12.5, 15, 20, 25, 30, 40, 50, 60, 70], [np.inf]])


def _read(file: Path) -> np.ndarray:
    return np.fromfile(file, np.float32).reshape(-1, 5)


@pytest.fixture(scope="module")
def real_clouds(realdata_dir: Path) -> list[np.ndarray]:
    files = [
        *realdata_dir.glob("nuscenes_mini_val/*/LIDAR_TOP/*.pcd.bin"),
        *realdata_dir.glob("lidar/*.pcd.bin"),
    ]
    assert len(files) == 4
    return [_read(file) for file in sorted(files)]


@pytest.fixture(scope="module")
def simulated_clouds(wide_root: Path) -> list[np.ndarray]:
    return [_read(file) for file in sorted((wide_root / "samples" / "LIDAR_TOP").iterdir())]


def _mean_histogram(clouds: list[np.ndarray], edges: np.ndarray) -> np.ndarray:
    shares = [
        np.histogram(np.linalg.norm(cloud[:, :3].astype(np.float64), axis=1), edges)[0] / len(cloud)
        for cloud in clouds
    ]
    return np.mean(shares, axis=0)


def _rings(clouds: list[np.ndarray], min_range_m: float) -> np.ndarray:
    """Share of each ring among the points beyond a range."""
    shares = []
    for cloud in clouds:
        far = np.linalg.norm(cloud[:, :3], axis=1) >= min_range_m
        counts = np.bincount(cloud[far, 4].astype(int), minlength=32)
        shares.append(counts / counts.sum())
    return np.mean(shares, axis=0)


def _total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)


def test_number_of_points(simulated_clouds: list[np.ndarray], real_clouds: list[np.ndarray]) -> None:
    real = np.mean([len(cloud) for cloud in real_clouds])
    assert all(abs(len(cloud) / real - 1) < 0.15 for cloud in simulated_clouds)


@pytest.mark.parametrize("edges", [RANGE_EDGES_M, FINE_EDGES_M], ids=["coarse", "fine"])
def test_ranges(simulated_clouds: list[np.ndarray], real_clouds: list[np.ndarray], edges: np.ndarray) -> None:
    assert (
        _total_variation(_mean_histogram(simulated_clouds, edges), _mean_histogram(real_clouds, edges)) < 0.2
    )


@pytest.mark.parametrize("min_range_m", [0.0, 2.0], ids=["all points", "without ego returns"])
def test_rings(simulated_clouds: list[np.ndarray], real_clouds: list[np.ndarray], min_range_m: float) -> None:
    assert _total_variation(_rings(simulated_clouds, min_range_m), _rings(real_clouds, min_range_m)) < 0.1


def test_near_points(simulated_clouds: list[np.ndarray], real_clouds: list[np.ndarray]) -> None:
    """The roof and the empty rays make as many points inside a metre as in reality."""
    edges = np.array([0.0, 1.2, np.inf])
    near, real = _mean_histogram(simulated_clouds, edges)[0], _mean_histogram(real_clouds, edges)[0]
    assert abs(near - real) < 0.1


def test_intensity(simulated_clouds: list[np.ndarray], real_clouds: list[np.ndarray]) -> None:
    simulated, real = (np.concatenate(c)[:, 3] for c in (simulated_clouds, real_clouds))
    assert simulated.min() >= 0
    assert simulated.max() <= 255
    assert 0.5 < np.median(simulated) / np.median(real) < 2


def test_layout_of_the_files(simulated_clouds: list[np.ndarray]) -> None:
    for cloud in simulated_clouds:
        assert np.isfinite(cloud).all()
        np.testing.assert_array_equal(cloud[:, 4], np.tile(np.arange(32), len(cloud) // 32))
        azimuth = np.unwrap(np.arctan2(*cloud[31::32, 1::-1].T))[
            np.linalg.norm(cloud[31::32, :3], axis=1) > 2
        ]
        assert np.median(np.diff(azimuth)) < 0


def _pose(tables: dict[str, dict[str, Any]], sweep: dict[str, Any]) -> np.ndarray:
    pose = np.eye(4)
    for table in ("ego_pose", "calibrated_sensor"):
        row, step = tables[table][sweep[f"{table}_token"]], np.eye(4)
        step[:3, :3] = quaternion_to_matrix(np.array(row["rotation"]))
        step[:3, 3] = row["translation"]
        pose = pose @ step
    return pose


def _ten_sweeps(root: Path, tables: dict[str, dict[str, Any]], key: dict[str, Any]) -> np.ndarray:
    to_key = np.linalg.inv(_pose(tables, key))
    clouds, sweep = [_read(root / key["filename"])[:, :3]], key
    for _ in range(9):
        sweep = tables["sample_data"][sweep["prev"]]
        xyz = _read(root / sweep["filename"])[:, :3]
        xyz = xyz[~(np.abs(xyz[:, :2]) < 1).all(axis=1)]
        move = to_key @ _pose(tables, sweep)
        clouds.append(xyz @ move[:3, :3].T + move[:3, 3])
    return np.concatenate(clouds)


def test_voxels_of_ten_sweeps(wide_root: Path) -> None:
    tables = {
        name: {
            row["token"]: row for row in json.loads((wide_root / "v1.0-mini" / f"{name}.json").read_text())
        }
        for name in ("sample_data", "ego_pose", "calibrated_sensor")
    }
    low, high, size = np.array([-54, -54, -5]), np.array([54, 54, 3]), np.array([0.075, 0.075, 0.2])
    counts = []
    for key in tables["sample_data"].values():
        if key["is_key_frame"]:
            xyz = _ten_sweeps(wide_root, tables, key)
            cells = ((xyz - low) / size)[((xyz >= low) & (xyz < high)).all(axis=1)].astype(np.int64)
            counts.append(len(np.unique(cells @ np.array([1, 2000, 4_000_000]))))
    assert len(counts) == 10
    assert 50_000 < np.mean(counts) < 140_000


def test_sizes_follow_nuscenes(wide_root: Path) -> None:
    """Mean length, width, height per class within 15 % of nuScenes trainval's."""
    known = {
        "car": (4.63, 1.97, 1.74), "truck": (6.93, 2.51, 2.84), "construction_vehicle": (6.37, 2.85, 3.19),
        "bus": (10.5, 2.94, 3.47), "trailer": (12.29, 2.90, 3.87), "barrier": (0.50, 2.53, 0.98),
        "motorcycle": (2.11, 0.77, 1.47), "bicycle": (1.70, 0.60, 1.28), "pedestrian": (0.73, 0.67, 1.77),
        "traffic_cone": (0.41, 0.41, 1.07),
    }  # fmt: skip
    folder = wide_root / "v1.0-mini"
    category = {row["token"]: row["name"] for row in json.loads((folder / "category.json").read_text())}
    instances = {row["token"]: row for row in json.loads((folder / "instance.json").read_text())}
    sizes: dict[str, list[list[float]]] = {name: [] for name in known}
    for row in json.loads((folder / "sample_annotation.json").read_text()):
        name = CATEGORY_TO_CLASS.get(category[instances[row["instance_token"]]["category_token"]])
        if name:
            sizes[name].append([row["size"][1], row["size"][0], row["size"][2]])
    for name, size in known.items():
        assert len(sizes[name]) >= 10, name
        np.testing.assert_allclose(np.mean(sizes[name], axis=0), size, rtol=0.15, err_msg=name)
