import json
from pathlib import Path

import numpy as np
import pytest
from pyquaternion import Quaternion

from cpq_train.data.boxes import (
    global_to_lidar,
    invert_poses,
    lidar_to_global,
    multiply_quaternions,
    pose_matrices,
    rotation_matrices,
    wrap_angles,
)
from cpq_train.data.index import NuScenesIndex


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_quaternions_equal_pyquaternion(rng: np.random.Generator) -> None:
    left, right = rng.normal(size=(2, 20, 4))
    products = multiply_quaternions(left, right)
    matrices = rotation_matrices(left)
    for a, b, product, matrix in zip(left, right, products, matrices, strict=True):
        np.testing.assert_allclose(product, (Quaternion(a) * Quaternion(b)).elements, atol=1e-14)
        np.testing.assert_allclose(matrix, Quaternion(a).rotation_matrix, atol=1e-14)


def test_inverse_poses(rng: np.random.Generator) -> None:
    matrices = pose_matrices(rng.normal(size=(5, 4)), 100 * rng.normal(size=(5, 3)))
    np.testing.assert_allclose(invert_poses(matrices) @ matrices, np.tile(np.eye(4), (5, 1, 1)), atol=1e-12)


def test_lidar_to_global_equals_golden_submission(index: NuScenesIndex, golden_dir: Path) -> None:
    arrays = np.load(golden_dir / "golden_infos.npz")
    results = json.loads((golden_dir / "golden_submission.json").read_text())["results"]
    for i, row in enumerate(index.sample_rows("val")):
        boxes = lidar_to_global(
            arrays[f"det{i}_boxes_lidar"],
            index.sample_lidar_rotations[row],
            index.sample_lidar_translations[row],
            index.sample_ego_rotations[row],
            index.sample_ego_translations[row],
        )
        submitted = results[index.sample_token(row)]
        for column, key in zip(boxes, ("translation", "size", "rotation", "velocity"), strict=True):
            np.testing.assert_allclose(column, [box[key] for box in submitted], atol=1e-6, rtol=0)


def test_annotations_survive_the_way_there_and_back(index: NuScenesIndex) -> None:
    """Apart from the tilt of the vehicle, which a yaw cannot express."""
    for row in index.sample_rows("train"):
        where = index.annotations(row)
        there = index.annotation_boxes[where]
        back = lidar_to_global(
            there,
            index.sample_lidar_rotations[row],
            index.sample_lidar_translations[row],
            index.sample_ego_rotations[row],
            index.sample_ego_translations[row],
        )
        np.testing.assert_allclose(back.translation, index.annotation_translations[where], atol=1e-9)
        np.testing.assert_array_equal(back.size_wlh, index.annotation_sizes_wlh[where])
        np.testing.assert_allclose(back.velocity, index.annotation_velocities[where], atol=0.3)
        to_global = index.sample_ego_to_global[row] @ index.sample_lidar_to_ego[row]
        velocities = np.pad(back.velocity, [(0, 0), (0, 1)])
        again = global_to_lidar(back.translation, back.size_wlh, back.rotation, velocities, to_global)
        np.testing.assert_allclose(again[:, :7], there[:, :7], atol=1e-9)


def test_wrap_angles_equals_golden(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "golden_aug.npz")
    wrapped = wrap_angles(golden["limit_period_in"])
    np.testing.assert_allclose(wrapped, golden["limit_period_out"], atol=1e-6, rtol=0)
    assert wrapped.dtype == np.float32
    assert wrap_angles(np.array([np.pi, -np.pi])).tolist() == [-np.pi, -np.pi]
