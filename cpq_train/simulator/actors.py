"""Actors: the annotated objects of a scene, the ways they move, and the space that things take up over time.

Letters: T sweep times, N actors, K coarse times at which collisions are looked for.
"""

from dataclasses import dataclass, field

import numpy as np

from cpq_train.simulator.geometry import Array, BoolArray, rectangles_overlap, segment_crosses
from cpq_train.simulator.parts import Part
from cpq_train.simulator.shapes import Size

COARSE = 5
"""Collisions are looked for at every fifth sweep."""


@dataclass(frozen=True)
class Actor:
    """One annotated object.

    Attributes:
        category: nuScenes category.
        size_m: Length, width, height of its box.
        poses_t3: (T, 3) x, y, yaw at every sweep.
        state: Attribute when it stands still: parked, stopped, standing, sitting_lying_down, with_rider or
            without_rider; of no meaning for categories without attributes.
        parts: Its body in its own frame.
    """

    category: str
    size_m: Size
    poses_t3: Array
    state: str
    parts: list[Part]


def draw_travel(rng: np.random.Generator, times_s: Array, mean_mps: float) -> Array:
    """Metres travelled (T,) at a speed that swings slowly about its mean and never turns negative."""
    period = rng.uniform(8.0, 20.0)
    swing = rng.uniform(0.0, 0.35) * np.sin(2 * np.pi * times_s / period + rng.uniform(0, 2 * np.pi))
    speed = np.maximum(mean_mps * (1 + swing), 0.0)
    return np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(times_s))])


@dataclass
class Occupancy:
    """Footprints of everything placed so far, at the coarse times.

    Attributes:
        poses_nk3: Poses per footprint.
        halves_n2: Half lengths and widths.
        tall_n: Whether a footprint blocks the view.
    """

    poses_nk3: Array
    halves_n2: Array = field(default_factory=lambda: np.zeros((0, 2)))
    tall_n: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def is_free(self, poses_k3: Array, half_2: Array, margin_m: float) -> bool:
        """Whether a footprint moving along `poses_k3` stays `margin_m` away from all others."""
        half = half_2 + margin_m
        reach = np.hypot(*half) + np.hypot(self.halves_n2[:, 0], self.halves_n2[:, 1])
        delta = self.poses_nk3[:, :, :2] - poses_k3[None, :, :2]
        n, k = np.nonzero((delta**2).sum(axis=2) < reach[:, None] ** 2)
        if not len(n):
            return True
        near = rectangles_overlap(
            poses_k3[k], np.broadcast_to(half, (len(n), 2)), self.poses_nk3[n, k], self.halves_n2[n]
        )
        return not near.any()

    def add(self, poses_k3: Array, half_2: Array, tall: bool) -> None:
        """Takes a footprint in."""
        self.poses_nk3 = np.concatenate([self.poses_nk3, poses_k3[None]])
        self.halves_n2 = np.concatenate([self.halves_n2, half_2[None]])
        self.tall_n = np.append(self.tall_n, tall)

    def is_hidden(self, eye_xy: Array, xy: Array, k: int) -> bool:
        """Whether something tall stands between two points at coarse time k."""
        tall = self.tall_n
        return bool(segment_crosses(eye_xy, xy, self.poses_nk3[tall, k], self.halves_n2[tall]).any())


def footprint(size: Size) -> Array:
    """Half length and half width, (2,)."""
    return np.array([size[0] / 2, size[1] / 2])
