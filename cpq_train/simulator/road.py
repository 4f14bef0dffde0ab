"""Roads: a centre line with lanes beside it, and the streets of one scene.

Positions are (s, d): metres along the centre line and metres to its left. Traffic keeps to the right.
Letters: P points, T times.
"""

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.geometry import Array

LANE_WIDTH_M = 3.5
PARKING_WIDTH_M = 2.6
SIDEWALK_WIDTH_M = 3.5
SIGHT_M = 115.0
"""Roads go on this far beyond the ego vehicle's way."""


@dataclass(frozen=True)
class Lane:
    """A lane at offset `d`, driven along +s (direction 1) or -s (direction -1)."""

    d: float
    direction: int


@dataclass(frozen=True)
class Road:
    """A centre line sampled every metre, and what lies beside it.

    Attributes:
        s: (S,) metres along the line.
        xyyaw: (S, 3) position and heading of the line, heading unwrapped.
        lanes: Lanes in use.
        left_m: Width from the centre line to the left kerb (parking lane included).
        right_m: The same to the right.
    """

    s: Array
    xyyaw: Array
    lanes: tuple[Lane, ...]
    left_m: float
    right_m: float

    @property
    def corridor_m(self) -> float:
        """Half width that holds the road and both sidewalks."""
        return max(self.left_m, self.right_m) + SIDEWALK_WIDTH_M

    def kerb_m(self, side: float) -> float:
        """Width from the centre line to the kerb on the left (side 1) or the right (side -1)."""
        return self.left_m if side > 0 else self.right_m

    def pose(self, s: Array, d: Array | float, direction: int = 1) -> Array:
        """Poses (..., 3) at (s, d); heading against the line for direction -1."""
        x, y, yaw = (np.interp(s, self.s, self.xyyaw[:, k]) for k in range(3))
        turn = 0.0 if direction > 0 else np.pi
        return np.stack([x - d * np.sin(yaw), y + d * np.cos(yaw), yaw + turn], axis=-1)

    def distance(self, xy_p2: Array) -> Array:
        """Metres from points to the centre line, (P,)."""
        line = self.xyyaw[::2, :2]
        squared = ((xy_p2[:, None, :] - line[None]) ** 2).sum(axis=2)
        return np.asarray(np.sqrt(squared.min(axis=1)))


def _centre_line(rng: np.random.Generator, length_m: float) -> tuple[Array, Array]:
    """A straight, curved or turning line; s = 0 lies at the origin."""
    s = np.arange(-SIGHT_M, length_m + SIGHT_M + 1.0)
    shape = rng.choice(["straight", "curve", "turn"], p=[0.4, 0.3, 0.3])
    curvature = np.full(len(s), rng.normal(0, 1 / 1200))
    if shape == "curve":
        curvature += rng.choice([-1, 1]) / rng.uniform(55, 160)
    elif shape == "turn":
        start, radius = rng.uniform(-8, max(4.0, 0.7 * length_m)), rng.uniform(15, 25)
        arc = np.radians(rng.uniform(45, 90)) * radius
        curvature += np.where((s > start) & (s < start + arc), rng.choice([-1, 1]) / radius, 0.0)
    curvature = np.convolve(np.pad(curvature, 4, mode="edge"), np.full(9, 1 / 9), mode="valid")
    heading = np.cumsum(curvature) + rng.uniform(-np.pi, np.pi)
    xy = np.stack([np.cumsum(np.cos(heading)), np.cumsum(np.sin(heading))], axis=1)
    zero = int(np.flatnonzero(s == 0)[0])
    return s, np.concatenate([xy - xy[zero], heading[:, None]], axis=1)


def draw_main_road(rng: np.random.Generator, length_m: float) -> Road:
    """The ego vehicle's road; its lane is d = 0."""
    s, line = _centre_line(rng, length_m)
    num_right, num_left = int(rng.integers(0, 2)), int(rng.integers(1, 3))
    lanes = [Lane(-LANE_WIDTH_M * k, 1) for k in range(num_right + 1)]
    lanes += [Lane(LANE_WIDTH_M * (k + 1), -1) for k in range(num_left)]
    parking_left, parking_right = PARKING_WIDTH_M * (rng.random(2) < 0.8)
    return Road(
        s,
        line,
        tuple(lanes),
        left_m=LANE_WIDTH_M * (num_left + 0.5) + float(parking_left),
        right_m=LANE_WIDTH_M * (num_right + 0.5) + float(parking_right),
    )


def draw_cross_road(rng: np.random.Generator, main: Road, length_m: float) -> Road:
    """A straight road through the main one, with one or two lanes each way."""
    crossing = main.pose(np.array(rng.uniform(8.0, length_m + 42.0) * rng.choice([1, 1, -1])), 0.0)
    yaw = crossing[2] + np.pi / 2 + rng.normal(0, 0.12)
    s = np.arange(-SIGHT_M, SIGHT_M + 1.0)
    line = np.stack(
        [crossing[0] + s * np.cos(yaw), crossing[1] + s * np.sin(yaw), np.full(len(s), yaw)], axis=1
    )
    num = int(rng.integers(1, 3))
    lanes = [Lane(side * LANE_WIDTH_M * (k + 0.5), -side) for k in range(num) for side in (-1, 1)]
    return Road(s, line, tuple(lanes), LANE_WIDTH_M * num, LANE_WIDTH_M * num)


def draw_roads(rng: np.random.Generator, length_m: float) -> list[Road]:
    """Main road first, then with four chances in five a cross road."""
    roads = [draw_main_road(rng, length_m)]
    if rng.random() < 0.8:
        roads.append(draw_cross_road(rng, roads[0], length_m))
    return roads
