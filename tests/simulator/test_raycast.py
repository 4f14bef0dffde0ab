"""The windowed cast against a cast of every part at every ray, and against known distances."""

import numpy as np
import pytest

from cpq_train.simulator import raycast
from cpq_train.simulator.geometry import quaternion_to_matrix, rotate, yaw_pitch_roll_quaternion
from cpq_train.simulator.ground import draw_ground
from cpq_train.simulator.parts import BOX, ELLIPSOID, FRUSTUM, Part, Parts, collect
from cpq_train.simulator.scan import scan
from cpq_train.simulator.sensor import MAX_RANGE_M, NUM_RINGS, Rays, draw_mounting, make_rays
from cpq_train.simulator.world import draw_world


def _row_of_rays(directions: list[list[float]]) -> np.ndarray:
    rays = np.array(directions)
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _everything(parts: Parts, rays: Rays) -> tuple[np.ndarray, np.ndarray]:
    part, ray = np.meshgrid(np.arange(len(parts)), np.arange(len(rays.directions_r3)), indexing="ij")
    return part.ravel(), ray.ravel()


def _opaque(parts: Parts) -> Parts:
    return Parts(
        parts.kind, parts.center, parts.half, parts.yaw, parts.taper, 0 * parts.material, parts.owner
    )


@pytest.mark.parametrize("seed", range(3))
def test_windows_lose_no_hit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    world = draw_world(rng, np.arange(11) * 0.05)
    rays = make_rays(rng)
    columns = np.sort(rng.choice(rays.num_columns, 60, replace=False))
    keep = (columns[:, None] * NUM_RINGS + np.arange(NUM_RINGS)).ravel()
    parts = _opaque(world.parts_at(5))
    origin, to_world = world.sensor_pose(5)
    nothing = np.full(len(rays.directions_r3), np.inf)
    windowed = raycast.cast(parts, rays, rotate(rays.directions_r3, to_world), origin, to_world, nothing, rng)
    few = Rays(rays.directions_r3[keep], rays.num_columns, rays.first_azimuth_rad)
    monkeypatch.setattr(
        raycast, "_pairs", lambda parts, frame, rays, origin, to_world: _everything(parts, rays)
    )
    full = raycast.cast(parts, few, rotate(few.directions_r3, to_world), origin, to_world, nothing[keep], rng)
    assert np.isfinite(full.range_r).mean() > 0.1
    np.testing.assert_array_equal(windowed.range_r[keep], full.range_r)
    np.testing.assert_array_equal(windowed.part_r[keep], full.part_r)
    assert np.isin(windowed.pair_ray, keep).sum() == len(full.pair_ray)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(BOX, (10, 0, 0), (2, 1, 1), "concrete"), [8.0, 8.0 * np.hypot(1, 0.1), np.inf]),
        (Part(BOX, (10, 0, 0), (2, 1, 1), "concrete", yaw=np.pi / 2), [9.0, 9.0 * np.hypot(1, 0.1), np.inf]),
        (Part(ELLIPSOID, (10, 0, 0), (2, 2, 2), "concrete"), [8.0, None, np.inf]),
        (Part(FRUSTUM, (10, 0, 0), (1, 1, 2), "concrete"), [9.0, None, np.inf]),
        (Part(FRUSTUM, (10, 0, 0), (1, 1, 2), "concrete", taper=0.5), [9.25, None, np.inf]),
    ],
)
def test_known_distances(part: Part, expected: list[float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    rays = Rays(_row_of_rays([[1, 0, 0], [1, 0.1, 0], [0, 1, 0]]), 3, np.pi)
    monkeypatch.setattr(
        raycast, "_pairs", lambda parts, frame, rays, origin, to_world: _everything(parts, rays)
    )
    hits = raycast.cast(
        collect([part], [0]),
        rays,
        rays.directions_r3,
        np.zeros(3),
        np.eye(3),
        np.full(3, np.inf),
        np.random.default_rng(0),
    )
    for found, known in zip(hits.range_r, expected, strict=True):
        assert known is None or found == pytest.approx(known, abs=1e-9)


def test_nearer_things_hide_farther_ones() -> None:
    rays = make_rays(np.random.default_rng(0))
    wall, car = Part(BOX, (0, 10, 0), (5, 0.2, 5), "concrete"), Part(BOX, (0, 20, 0), (2, 1, 1), "concrete")
    ground = np.full(len(rays.directions_r3), np.inf)
    for things, met_share in (([car], 1.0), ([car, wall], 0.0)):
        parts, rng = collect(things, [0, -1][: len(things)]), np.random.default_rng(0)
        hits = raycast.cast(parts, rays, rays.directions_r3, np.zeros(3), np.eye(3), ground, rng)
        alone, met = raycast.surface_rays(hits, parts.owner, 1)
        assert alone[0] > 50
        assert met[0] == met_share * alone[0]


def test_rays_end_on_the_ground() -> None:
    rng = np.random.default_rng(1)
    rays = make_rays(rng)
    for _ in range(5):
        ground = draw_ground(rng)
        _, mount = draw_mounting(rng)
        to_world = quaternion_to_matrix(yaw_pitch_roll_quaternion(0.3)) @ quaternion_to_matrix(mount)
        height = float(ground.height(np.zeros(1), np.zeros(1))[0])
        origin = np.array([0.0, 0.0, height + 1.84])
        directions = rotate(rays.directions_r3, to_world)
        range_r = ground.cast(origin, directions, MAX_RANGE_M)
        met = np.isfinite(range_r)
        assert 0.6 < met.mean() < 0.85
        xyz = origin + directions[met] * range_r[met, None]
        gap = xyz[:, 2] - ground.height(xyz[:, 0], xyz[:, 1])
        near = range_r[met] < 40
        assert np.abs(gap[near]).max() < 0.01
        assert np.percentile(np.abs(gap), 99) < 0.05


def test_points_return_where_the_rays_went() -> None:
    rng = np.random.default_rng(2)
    world = draw_world(rng, np.arange(11) * 0.05)
    points = scan(world, 5, rng, count_rays=False).points
    range_m = np.linalg.norm(points[:, :3], axis=1)
    far = range_m > 2
    elevation = np.degrees(np.arcsin(points[far, 2] / range_m[far]))
    np.testing.assert_allclose(elevation, -30.67 + 41.34 / 31 * points[far, 4], atol=1e-3)
