import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapely.geometry import Polygon

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.augmentation import Augmentation
from cpq_train.data.box_geometry import points_in_boxes
from cpq_train.data.column_files import checksum
from cpq_train.data.dataset import DetectionDataset, Item, SampleConfig, target_boxes, visible_boxes
from cpq_train.data.gt_database import GtDatabase, open_gt_database
from cpq_train.data.gt_sampling import TARGETS, GtSampler, GtSampling
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.sweeps import load_sweeps

CAR, TRUCK, BUS = (DETECTION_CLASSES.index(name) for name in ("car", "truck", "bus"))
Scene = tuple[np.ndarray, np.ndarray]


def made_up(*objects: tuple[int, float, float, int]) -> GtDatabase:
    """Objects of class, x, y, number of points: boxes of 4 x 2 x 2 m along x, points at their centres."""
    number = len(objects)
    boxes = np.zeros((number, 9))
    boxes[:, 3:6] = 4, 2, 2
    boxes[:, 7:9] = np.nan
    boxes[:, :2] = [(x, y) for _, x, y, _ in objects]
    num_points = np.array([n for *_, n in objects], dtype=np.int32)
    points = np.zeros((num_points.sum(), 5), dtype=np.float32)
    points[:, 4] = np.arange(len(points)) / 100
    return GtDatabase(
        folder=Path("made_up"),
        classes=np.array([class_id for class_id, *_ in objects], dtype=np.int8),
        boxes=boxes,
        num_points=num_points,
        sample_rows=np.zeros(number, dtype=np.int32),
        tokens=np.zeros(number, dtype="S32"),
        point_offsets=np.concatenate([[0], np.cumsum(num_points)]),
        point_checksums=np.array([checksum(own) for own in np.split(points, np.cumsum(num_points)[:-1])]),
        points=points,
    )


def labelled(*boxes: tuple[int, float, float]) -> np.ndarray:
    return np.array([[x, y, 0, 4, 2, 2, 0, 0, 0, class_id + 1] for class_id, x, y in boxes]).reshape(-1, 10)


def fill(
    database: GtDatabase, targets: dict[str, int], boxes: np.ndarray, obstacles: np.ndarray | None = None,
    points: np.ndarray | None = None, seed: int = 0, **settings: Any,
) -> Scene:  # fmt: skip
    sampler = GtSampler(database, GtSampling(targets, **settings))
    points = np.zeros((0, 5), dtype=np.float32) if points is None else points
    obstacles = boxes[:, :9] if obstacles is None else obstacles
    return sampler.fill(points, boxes, obstacles, np.random.default_rng(seed))


def test_a_scene_is_filled_up_to_its_target() -> None:
    cars, buses = [(CAR, 10.0 * i, 0.0, 5) for i in range(8)], [(BUS, 10.0 * i, 9.0, 7) for i in range(3)]
    database = made_up(*cars, *buses)
    own = labelled((CAR, 0.0, -20.0), (CAR, 9.0, -20.0))
    points, boxes = fill(database, {"car": 5, "bus": 9, "truck": 2}, own)
    np.testing.assert_array_equal(boxes[:2], own)
    assert np.bincount(boxes[:, 9].astype(int)).tolist() == [0, 5, 0, 0, 3]
    assert len({tuple(box[:2]) for box in boxes}) == 8  # no object twice
    assert len(points) == 3 * 5 + 3 * 7
    assert not boxes[:, 7:9].any()  # an unknown velocity becomes 0
    for target in (2, 1):
        assert len(fill(database, {"car": target}, own)[1]) == 2


def test_draws_are_uniform_over_objects_with_enough_points() -> None:
    database = made_up(*[(CAR, 10.0 * i, 0.0, i) for i in range(9)])
    drawn = np.zeros(9, dtype=int)
    for seed in range(600):
        _, boxes = fill(database, {"car": 2}, labelled(), seed=seed, min_points=5)
        drawn[(boxes[:, 0] / 10).astype(int)] += 1
    assert drawn[:5].tolist() == [0] * 5
    assert drawn.sum() == 1200
    assert (abs(drawn[5:] - 300) < 60).all()


def test_what_collides_is_dropped() -> None:
    one = made_up((CAR, 0.0, 0.0, 5))
    assert len(fill(one, {"car": 1}, labelled())[1]) == 1
    assert len(fill(one, {"car": 1}, labelled((BUS, 3.9, 0.0)))[1]) == 1
    assert len(fill(one, {"car": 1}, labelled((BUS, 4.0, 0.0)))[1]) == 2  # they only touch
    ignored = np.array([[1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 0.7, np.nan, np.nan]])
    assert len(fill(one, {"car": 1}, labelled(), ignored)[1]) == 0


def test_candidates_of_a_class_that_collide_both_drop() -> None:
    three = made_up((CAR, 0.0, 0.0, 5), (CAR, 3.0, 0.0, 5), (CAR, 20.0, 0.0, 5))
    _, boxes = fill(three, {"car": 3}, labelled())
    assert boxes[:, 0].tolist() == [20.0]


def test_a_dropped_candidate_blocks_its_class_but_not_the_next() -> None:
    """The middle truck drops for the scene's box; its neighbour, with which it overlaps, drops with it."""
    database = made_up((TRUCK, 0.0, 0.0, 5), (TRUCK, 3.0, 0.0, 5), (BUS, 0.0, 0.0, 5))
    _, boxes = fill(database, {"truck": 2, "bus": 1}, labelled((CAR, 6.5, 0.0)))
    assert boxes[:, 9].tolist() == [CAR + 1, BUS + 1]


def test_classes_are_filled_in_the_order_of_the_configuration() -> None:
    database = made_up((TRUCK, 0.0, 0.0, 5), (BUS, 1.0, 0.0, 5))
    for first, second in (("truck", "bus"), ("bus", "truck")):
        _, boxes = fill(database, {first: 1, second: 1}, labelled())
        assert boxes[:, 9].tolist() == [DETECTION_CLASSES.index(first) + 1]


def test_points_of_the_scene_in_a_pasted_box_go() -> None:
    database = made_up((CAR, 10.0, 0.0, 5))
    scene = np.zeros((4, 5), dtype=np.float32)
    scene[:, 0] = 9.0, 11.5, 13.0, 10.0
    scene[3, 2] = 1.5  # above the box
    points, _ = fill(database, {"car": 1}, labelled(), points=scene)
    np.testing.assert_array_equal(points[:5, :3], [[10, 0, 0]] * 5)
    np.testing.assert_allclose(points[:5, 4], np.arange(5) / 100)
    np.testing.assert_array_equal(points[5:], scene[[2, 3]])


def test_fading_out() -> None:
    database = made_up((CAR, 0.0, 0.0, 5))
    sampler = GtSampler(database, GtSampling(fade_out_epochs=2), num_epochs=6)
    assert [sampler.is_on(epoch) for epoch in range(6)] == [True] * 4 + [False] * 2
    assert GtSampler(database, GtSampling()).is_on(10**6)
    with pytest.raises(UserError, match="fade_out_epochs is 2, and the number of epochs is not known"):
        GtSampler(database, GtSampling(fade_out_epochs=2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": {"car": -1}}, "targets car is -1: expected 0 or more"),
        ({"min_points": 0}, "min_points is 0: expected 1 or more"),
        ({"fade_out_epochs": -1}, "fade_out_epochs is -1: expected 0 or more"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GtSampling(**settings)


def test_a_target_of_no_class() -> None:
    database = made_up((CAR, 10.0, 0.0, 5))
    with pytest.raises(UserError, match="targets names 'tram': accepted are car, truck"):
        GtSampler(database, GtSampling({"tram": 1}))


@pytest.mark.parametrize("settings", [GtSampling({"bus": 3}), GtSampling(min_points=6), GtSampling({})])
def test_nothing_to_sample(settings: GtSampling) -> None:
    with pytest.raises(UserError, match=r"made_up holds no object with . points or more of"):
        GtSampler(made_up((CAR, 0.0, 0.0, 5)), settings)


@pytest.fixture(scope="module")
def database(simulated_index: NuScenesIndex, simulated_cache: Path) -> GtDatabase:
    return open_gt_database(simulated_index, "train", 2, simulated_cache)


def footprint(box: np.ndarray) -> Polygon:
    x, y, _, length, width, _, yaw = box[:7]
    forward, left = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
    corners = [(a * length * forward + b * width * left) / 2 for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
    return Polygon([(x + dx, y + dy) for dx, dy in corners])


@pytest.mark.parametrize("seed", range(3))
def test_simulated_scene(simulated_index: NuScenesIndex, database: GtDatabase, seed: int) -> None:
    row = int(simulated_index.sample_rows("train")[seed])
    points, own = load_sweeps(simulated_index, row, 2), target_boxes(simulated_index, row)
    obstacles = visible_boxes(simulated_index, row)
    targets = {name: 3 * number for name, number in TARGETS.items()}
    sampler = GtSampler(database, GtSampling(targets))
    filled, boxes = sampler.fill(points, own, obstacles, np.random.default_rng(seed))
    pasted = boxes[len(own) :]
    assert len(pasted) >= 5
    shapes = [footprint(box) for box in pasted]
    others = [footprint(box) for box in obstacles]
    for i, shape in enumerate(shapes):
        assert all(shape.intersection(other).area < 1e-9 for other in [*shapes[:i], *others])
    inside = points_in_boxes(filled, pasted)
    for box, rows in zip(pasted, inside, strict=True):
        (n,) = np.flatnonzero((database.boxes[:, :7] == box[:7]).all(axis=1))
        assert len(rows) == pytest.approx(database.num_points[n], abs=2)  # float32 at the surface
        assert rows.max() < database.num_points.sum()
        np.testing.assert_array_equal(np.unique(filled[rows, 4]), np.unique(database.points_of(n)[:, 4]))
    covered = np.unique(np.concatenate(points_in_boxes(points, pasted)))
    num_pasted = len(filled) - len(points) + len(covered)
    np.testing.assert_array_equal(filled[num_pasted:], np.delete(points, covered, axis=0))


CONFIG = SampleConfig(
    num_sweeps=2,
    voxel_size=(0.64, 0.64, 0.32),
    point_cloud_range=(-153.6, -153.6, -10.0, 153.6, 153.6, 6.0),
    max_points_per_voxel=10,
    max_num_voxels=60000,
    augmentation=Augmentation(),
    is_training=True,
)


def equal(first: Item, second: Item) -> bool:
    keys = ("voxel_features", "voxel_coords", "gt_boxes")
    return all(bool((first[key] == second[key]).all()) for key in keys)  # type: ignore[literal-required]


def test_a_dataset_samples_before_it_augments(simulated_index: NuScenesIndex, database: GtDatabase) -> None:
    rows = simulated_index.sample_rows("train")
    sampler = GtSampler(database, GtSampling(fade_out_epochs=1), num_epochs=2)
    plain = DetectionDataset(simulated_index, rows, CONFIG)
    filled = DetectionDataset(simulated_index, rows, CONFIG, sampler)
    assert len(filled[(0, 1)]["gt_boxes"]) > len(plain[(0, 1)]["gt_boxes"])
    assert equal(filled[(1, 1)], plain[(1, 1)])  # faded out
    assert equal(filled[(0, 1)], DetectionDataset(simulated_index, rows, CONFIG, sampler)[(0, 1)])
    still = dataclasses.replace(CONFIG, augmentation=None)
    unmoved = DetectionDataset(simulated_index, rows, still, sampler)[(0, 1)]["gt_boxes"].numpy()
    moved = filled[(0, 1)]["gt_boxes"].numpy()
    factor = moved[:, 3] / unmoved[:, 3]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    assert abs(factor[0] - 1) > 1e-4
