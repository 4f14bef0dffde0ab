import numpy as np
import pytest
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion
from shapely import affinity
from shapely import box as rectangle
from shapely.geometry import Polygon

from cpq_train.data.box_geometry import boxes_overlap, points_in_boxes


def random_boxes(rng: np.random.Generator, number: int, reach_m: float) -> np.ndarray:
    sizes = rng.uniform([0.3, 0.3, 0.5], [12.0, 3.0, 4.0], (number, 3))
    centres = rng.uniform(-reach_m, reach_m, (number, 3)) * [1, 1, 0.05]
    return np.column_stack([centres, sizes, rng.uniform(-4, 4, number), np.zeros((number, 2))])


def polygon(box: np.ndarray) -> Polygon:
    x, y, _, length, width, _, yaw = box[:7]
    flat = rectangle(-length / 2, -width / 2, length / 2, width / 2)
    return affinity.translate(affinity.rotate(flat, yaw, origin=(0, 0), use_radians=True), x, y)


@pytest.mark.parametrize("seed", range(4))
def test_overlap_equals_shapely(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_boxes(rng, 40, 15), random_boxes(rng, 60, 15)
    areas = np.array([[polygon(a).intersection(polygon(b)).area for b in second] for a in first])
    overlap = boxes_overlap(first, second)
    assert 100 < overlap.sum() < 2300
    np.testing.assert_array_equal(overlap, areas > 1e-12)


def test_rectangles_that_only_touch_do_not_overlap() -> None:
    box = np.array([[0.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0]])
    others = np.array(
        [
            [4.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0],
            [0.0, 2.0, 0.0, 4.0, 2.0, 1.0, 0.0],
            [3.999, 0.0, 9.0, 4.0, 2.0, 1.0, 0.0],  # at another height
            [4.0, 2.0, 0.0, 4.0, 2.0, 1.0, 0.0],  # corner to corner
            [0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 0.7],  # inside
            [3.0, 2.0, 0.0, 2.5, 2.5, 1.0, np.pi / 4],  # their boundaries by x and y overlap, they do not
        ]
    )
    assert boxes_overlap(box, others).tolist() == [[False, False, True, False, True, False]]
    assert boxes_overlap(others, box).T.tolist() == boxes_overlap(box, others).tolist()
    assert boxes_overlap(box, others[:0]).shape == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_points_in_boxes_equal_the_devkit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, 30, 40)
    points = rng.uniform([-60, -60, -4, 0, 0], [60, 60, 4, 255, 0.5], (40000, 5)).astype(np.float32)
    points[:100, :3] = np.repeat(boxes[:20, :3], 5, axis=0)
    found = points_in_boxes(points, boxes)
    for box, rows in zip(boxes, found, strict=True):
        theirs = Box(box[:3], box[[4, 3, 5]], Quaternion(axis=[0, 0, 1], radians=box[6]))
        expected = np.flatnonzero(points_in_box(theirs, points[:, :3].astype(np.float64).T))
        np.testing.assert_array_equal(rows, expected)
    assert sum(map(len, found)) > 250


def test_points_on_the_surface_are_inside() -> None:
    box = np.array([[10.0, -20.0, 1.0, 4.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    points = np.zeros((6, 5), dtype=np.float32)
    points[:, :3] = [(12, -20, 1), (10, -19, 1), (10, -20, 1.5), (12.001, -20, 1), (10, -18.99, 1), (0, 0, 0)]
    assert points_in_boxes(points, box)[0].tolist() == [0, 1, 2]
    assert points_in_boxes(points[:0], box)[0].tolist() == []
    assert points_in_boxes(points, box[:0]) == []
