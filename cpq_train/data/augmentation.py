"""Random flips, rotation, scaling and translation of a whole scene, in OpenPCDet's order and conventions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.data.boxes import YAW, Float, wrap_angles

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for every training sample. The defaults are those of the 0.1 m configuration.

    Attributes:
        flip_x: mirror over the x axis (y changes its sign) for half of the samples.
        flip_y: mirror over the y axis (x changes its sign) for half of the samples.
        max_rotation_rad: rotation around z, uniform in plus or minus this.
        min_scale: lower end of the uniform factor on positions, sizes and velocities.
        max_scale: upper end.
        translation_std_m: standard deviation of the normal shift along each axis.
    """

    flip_x: bool = True
    flip_y: bool = True
    max_rotation_rad: float = 0.3925
    min_scale: float = 0.95
    max_scale: float = 1.05
    translation_std_m: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                f"augmentation min_scale is {self.min_scale}, max_scale {self.max_scale}: "
                "expected 0 < min_scale <= max_scale"
            )
        for name in ("max_rotation_rad", "translation_std_m"):
            if getattr(self, name) < 0:
                raise UserError(f"augmentation {name} is {getattr(self, name)}: expected 0 or more")

    def apply(self, points: Points, boxes: Float, rng: np.random.Generator) -> None:
        """Changes a scene in place.

        Args:
            points: (P, >= 3) x, y, z first.
            boxes: (N, 9) box rows.
            rng: where the draws come from; their number does not depend on the scene.
        """
        is_flipped = rng.random(2) < 0.5
        if self.flip_x and is_flipped[0]:
            flip_x(points, boxes)
        if self.flip_y and is_flipped[1]:
            flip_y(points, boxes)
        rotate(points, boxes, rng.uniform(-self.max_rotation_rad, self.max_rotation_rad))
        scale(points, boxes, rng.uniform(self.min_scale, self.max_scale))
        translate(points, boxes, rng.normal(0.0, self.translation_std_m, 3))
        boxes[:, YAW] = wrap_angles(boxes[:, YAW])


def flip_x(points: Points, boxes: Float) -> None:
    """Mirrors a scene over the x axis in place: y, yaw and vy change their signs."""
    points[:, 1] *= -1
    boxes[:, [1, YAW, 8]] *= -1


def flip_y(points: Points, boxes: Float) -> None:
    """Mirrors a scene over the y axis in place: x and vx change their signs, the yaw becomes -(yaw + pi)."""
    points[:, 0] *= -1
    boxes[:, [0, 7]] *= -1
    boxes[:, YAW] = -(boxes[:, YAW] + boxes.dtype.type(np.pi))


def rotate(points: Points, boxes: Float, angle_rad: float) -> None:
    """Rotates a scene around z in place, counter-clockwise."""
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    for vectors in (points[:, :2], boxes[:, :2], boxes[:, 7:9]):
        vectors[:] = vectors @ np.array([[cos, sin], [-sin, cos]], dtype=vectors.dtype)
    boxes[:, YAW] += angle_rad


def scale(points: Points, boxes: Float, factor: float) -> None:
    """Multiplies positions, sizes and velocities of a scene in place."""
    points[:, :3] *= factor
    boxes[:, :YAW] *= factor
    boxes[:, YAW + 1 :] *= factor


def translate(points: Points, boxes: Float, shift_m: Float) -> None:
    """Shifts a scene in place by (3,) metres."""
    points[:, :3] += shift_m.astype(points.dtype)
    boxes[:, :3] += shift_m
