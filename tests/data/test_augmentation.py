from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpq_train.common.errors import UserError
from cpq_train.data import augmentation
from cpq_train.data.augmentation import Augmentation

Change = Callable[[np.ndarray, np.ndarray], None]

OFF: dict[str, Any] = {
    "flip_x": False,
    "flip_y": False,
    "max_rotation_rad": 0.0,
    "min_scale": 1.0,
    "max_scale": 1.0,
}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flip_x", augmentation.flip_x),
        ("flip_y", augmentation.flip_y),
        ("rot_0.3", lambda points, boxes: augmentation.rotate(points, boxes, 0.3)),
        ("scale_1.07", lambda points, boxes: augmentation.scale(points, boxes, 1.07)),
    ],
)
def test_each_change_equals_golden(golden_dir: Path, name: str, change: Change) -> None:
    golden = np.load(golden_dir / "golden_aug.npz")
    points, boxes = golden["points"].copy(), golden["boxes"].copy()
    change(points, boxes)
    np.testing.assert_allclose(points, golden[f"{name}_points"], atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(boxes, golden[f"{name}_boxes"], atol=1e-5, rtol=1e-6)


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points on the front face centre of each box, one per box."""
    boxes = np.column_stack([rng.uniform(-40, 40, (6, 3)), rng.uniform(1, 5, (6, 3)), rng.uniform(-3, 3, 6)])
    boxes = np.column_stack([boxes, 3 * np.cos(boxes[:, 6]), 3 * np.sin(boxes[:, 6])])
    points = np.zeros((6, 5), dtype=np.float32)
    points[:, :3] = fronts(boxes)
    return points, boxes


def fronts(boxes: np.ndarray) -> np.ndarray:
    forward = np.column_stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))])
    return boxes[:, :3] + forward * boxes[:, 3:4] / 2


def test_points_stay_on_their_boxes() -> None:
    everything = Augmentation(max_rotation_rad=3.0, min_scale=0.8, max_scale=1.2, translation_std_m=0.5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        points, boxes = scene(rng)
        everything.apply(points, boxes, rng)
        np.testing.assert_allclose(points[:, :3], fronts(boxes), atol=2e-5)
        headings = np.arctan2(boxes[:, 8], boxes[:, 7])
        np.testing.assert_allclose(np.cos(headings - boxes[:, 6]), 1.0, atol=1e-9)
        assert (np.abs(boxes[:, 6]) <= np.pi).all()


def test_order_of_the_changes() -> None:
    """Flips, rotation, scaling, translation: one matrix, put together from the draws."""
    everything = Augmentation(max_rotation_rad=3.0, min_scale=0.8, max_scale=1.2, translation_std_m=0.5)
    for seed in range(20):
        points, boxes = scene(np.random.default_rng(seed))
        before, yaws = points[:, :3].astype(np.float64), boxes[:, 6].copy()
        velocities = boxes[:, 7:9].copy()
        everything.apply(points, boxes, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        flip_over_x, flip_over_y = draws.random(2) < 0.5
        angle, factor = draws.uniform(-3.0, 3.0), draws.uniform(0.8, 1.2)
        flip = np.diag([-1.0 if flip_over_y else 1.0, -1.0 if flip_over_x else 1.0])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = factor * turn @ flip
        shift = draws.normal(0.0, 0.5, 3)
        np.testing.assert_allclose(points[:, :2], before[:, :2] @ matrix.T + shift[:2], atol=2e-5)
        np.testing.assert_allclose(points[:, 2], factor * before[:, 2] + shift[2], atol=2e-5)
        np.testing.assert_allclose(boxes[:, 7:9], velocities @ matrix.T, atol=1e-9)
        headings = np.column_stack([np.cos(yaws), np.sin(yaws)]) @ (turn @ flip).T
        np.testing.assert_allclose(np.cos(boxes[:, 6]), headings[:, 0], atol=1e-9)
        np.testing.assert_allclose(np.sin(boxes[:, 6]), headings[:, 1], atol=1e-9)


def test_ranges_of_the_draws() -> None:
    scales, angles, flips = [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        points, boxes = np.zeros((1, 5), dtype=np.float32), np.zeros((1, 9))
        points[0, :3] = boxes[0, :3] = 10.0, 0.0, 1.0
        Augmentation(flip_x=False).apply(points, boxes, rng)
        flips.append(boxes[0, 0] < 0)
        scales.append(boxes[0, 2])
        angles.append(np.arcsin(boxes[0, 1] / np.hypot(boxes[0, 0], boxes[0, 1])))
    assert 0.4 < np.mean(flips) < 0.6
    assert 0.95 <= min(scales) < 0.955
    assert 1.045 < max(scales) <= 1.05
    assert -0.3926 <= min(angles) < -0.38
    assert 0.38 < max(angles) <= 0.3926


def test_off_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    points, boxes = scene(rng)
    points_before, boxes_before = points.copy(), boxes.copy()
    Augmentation(**OFF).apply(points, boxes, rng)
    np.testing.assert_array_equal(points, points_before)
    np.testing.assert_allclose(boxes, boxes_before, atol=1e-15)


@pytest.mark.parametrize(
    "wrong", [{"min_scale": 1.2}, {"min_scale": 0.0}, {"max_rotation_rad": -1.0}, {"translation_std_m": -0.1}]
)
def test_wrong_ranges(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Augmentation(**wrong)
