"""What is not annotated: buildings, walls, hedges, trees, poles, signs and small things at the roadside.

Letters: K coarse times, P points.
"""

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.actors import Occupancy
from cpq_train.simulator.geometry import Array
from cpq_train.simulator.parts import BOX, ELLIPSOID, FRUSTUM, Part
from cpq_train.simulator.road import SIDEWALK_WIDTH_M, Road

STYLES: dict[str, tuple[float, float, float, float]] = {
    "urban": (0.3, 6.0, 0.75, 16.0),
    "suburban": (5.0, 22.0, 0.55, 9.0),
    "industrial": (10.0, 34.0, 0.6, 10.0),
}
"""Per style: least and most setback (m) of buildings, share of the front built up, mean height (m)."""

_BASE_Z = -0.3
"""Where boxes begin, m: below ground, which is not flat."""


@dataclass(frozen=True)
class Thing:
    """A piece of the surroundings: its pose (x, y, yaw), its footprint, and its parts above the ground."""

    pose: Array
    half: Array
    parts: list[Part]


def draw_buildings(rng: np.random.Generator, roads: list[Road], length_m: float) -> list[Thing]:
    """Buildings along both sides of all roads, none of them on a road."""
    setback_min, setback_max, share, height = STYLES[str(rng.choice(list(STYLES), p=[0.4, 0.35, 0.25]))]
    buildings = []
    for road in roads:
        for side in (-1.0, 1.0):
            s = float(road.s[0]) + rng.uniform(25, 45)
            end = min(float(road.s[-1]), length_m + 90.0)
            while s < end:
                front = rng.uniform(10, 38)
                if rng.random() < share:
                    setback = rng.uniform(setback_min, setback_max)
                    thing = _building(rng, road, side, s + front / 2, front, setback, height)
                    if _is_off_roads(thing, roads):
                        buildings.append(thing)
                s += front + rng.uniform(1, 12)
    return buildings


def _building(rng: np.random.Generator, road: Road, side: float, s: float, front: float, setback: float,
              mean_height: float) -> Thing:  # fmt: skip
    depth, height = rng.uniform(8, 16), max(3.5, rng.normal(mean_height, 0.35 * mean_height))
    pose = road.pose(np.array(s), side * (road.kerb_m(side) + SIDEWALK_WIDTH_M + setback + depth / 2))
    half = np.array([front / 2, depth / 2])
    parts = [_box((0, 0), (*half, height), "facade")]
    for _ in range(int(rng.integers(1, 5))):
        # Bays, porches and recesses break the flat front.
        along, out = rng.uniform(-0.8, 0.8) * half[0], -side * (half[1] + 0.3)
        parts.append(
            _box((along, out), (rng.uniform(0.3, 2.0), 0.4, height * rng.uniform(0.3, 1.0)), "facade")
        )
    return Thing(pose, half + 0.5, parts)


def _box(center_xy: tuple[float, float], size: tuple[float, float, float], material: str) -> Part:
    """A box on the ground: half length, half width, height."""
    half_z = (size[2] - _BASE_Z) / 2
    return Part(BOX, (*center_xy, _BASE_Z + half_z), (size[0], size[1], half_z), material)


def _is_off_roads(thing: Thing, roads: list[Road]) -> bool:
    u, v = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 5))
    x, y = u.ravel() * thing.half[0], v.ravel() * thing.half[1]
    cos, sin = np.cos(thing.pose[2]), np.sin(thing.pose[2])
    points = thing.pose[:2] + np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)
    return all(float(road.distance(points).min()) > road.corridor_m for road in roads)


def _tree(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    trunk, radius, crown = rng.uniform(0.1, 0.25), rng.uniform(1.3, 3.2), rng.uniform(1.3, 2.8)
    middle = rng.uniform(2.0, 3.2) + crown
    parts = [
        Part(FRUSTUM, (0, 0, middle / 2 - 0.2), (trunk, trunk, middle / 2), "bark", taper=0.7),
        Part(ELLIPSOID, (0, 0, middle), (radius, radius, crown), "leaves"),
    ]
    return np.array([trunk, trunk]), parts


def _bush(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    half = rng.uniform(0.3, 1.1, 2)
    height = rng.uniform(0.3, 0.9)
    return half, [Part(ELLIPSOID, (0, 0, 0.7 * height), (*half, height), "leaves")]


def _hedge(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    half = np.array([rng.uniform(1.5, 7.0), rng.uniform(0.25, 0.6)])
    return half, [_box((0, 0), (*half, rng.uniform(0.7, 2.0)), "leaves")]


def _wall(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    half = np.array([rng.uniform(1.5, 9.0), rng.uniform(0.06, 0.2)])
    return half, [_box((0, 0), (*half, rng.uniform(0.6, 2.4)), str(rng.choice(["concrete", "facade"])))]


def _pole(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    radius, height = rng.uniform(0.05, 0.16), rng.uniform(2.5, 9.0)
    parts = [Part(FRUSTUM, (0, 0, height / 2 - 0.2), (radius, radius, height / 2), "metal", taper=0.7)]
    if rng.random() < 0.5:
        parts.append(
            Part(BOX, (0, 0, rng.uniform(2.1, 2.4)), (0.02, rng.uniform(0.2, 0.4), 0.3), "reflective")
        )
    return np.array([radius, radius]), parts


def _bollard(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    radius = rng.uniform(0.06, 0.14)
    return np.array([radius, radius]), [Part(FRUSTUM, (0, 0, 0.4), (radius, radius, 0.5), "metal")]


def _cabinet(rng: np.random.Generator) -> tuple[Array, list[Part]]:
    half = rng.uniform(0.2, 0.6, 2)
    return half, [_box((0, 0), (*half, rng.uniform(0.7, 1.7)), "metal")]


SMALL = {
    # Name: maker, number within reach of one ego position, share at the roadside (the rest stands in lots).
    "tree": (_tree, 20, 0.5),
    "pole": (_pole, 12, 0.85),
    "bush": (_bush, 14, 0.3),
    "hedge": (_hedge, 5, 0.3),
    "wall": (_wall, 5, 0.2),
    "bollard": (_bollard, 4, 1.0),
    "cabinet": (_cabinet, 4, 0.7),
}


def draw_small_things(rng: np.random.Generator, roads: list[Road], occupancy: Occupancy,
                      ego_poses_t3: Array, length_m: float) -> list[Thing]:  # fmt: skip
    """Small things that stay clear of all that is placed already, and enter the occupancy."""
    things = []
    num_coarse = occupancy.poses_nk3.shape[1]
    for maker, number, roadside in SMALL.values():
        for _ in range(rng.poisson(number * (1 + length_m / 120))):
            half, parts = maker(rng)
            by_road = rng.random() < roadside
            pose = (
                _by_road(rng, roads, length_m)
                if by_road
                else _in_lot(rng, roads, ego_poses_t3, float(half.max()))
            )
            if pose is None:
                continue
            poses = np.repeat(pose[None], num_coarse, axis=0)
            if occupancy.is_free(poses, half, 0.35):
                occupancy.add(poses, half, False)
                things.append(Thing(pose, half, parts))
    return things


def _by_road(rng: np.random.Generator, roads: list[Road], length_m: float) -> Array:
    road, side = roads[int(rng.integers(len(roads)))], float(rng.choice([-1, 1]))
    d = side * (road.kerb_m(side) + rng.choice([0.5, SIDEWALK_WIDTH_M + 0.6]) + rng.normal(0, 0.1))
    return road.pose(np.array(rng.uniform(-60, length_m + 60)), d)


def _in_lot(rng: np.random.Generator, roads: list[Road], ego_poses_t3: Array, reach_m: float) -> Array | None:
    ego = ego_poses_t3[int(rng.integers(len(ego_poses_t3)))]
    angle, range_m = rng.uniform(-np.pi, np.pi), 70 * np.sqrt(rng.random())
    xy = ego[:2] + range_m * np.array([np.cos(angle), np.sin(angle)])
    off = all(float(road.distance(xy[None])[0]) > road.corridor_m + reach_m for road in roads)
    return np.array([*xy, rng.uniform(-np.pi, np.pi)]) if off else None
