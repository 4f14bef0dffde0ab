"""Parts: the convex solids that everything but the ground is made of, and the materials they are made of.

A part is upright (it turns about z only) and is the image of a unit solid scaled by half extents:
BOX |x|, |y|, |z| <= 1; FRUSTUM x^2 + y^2 <= r(z)^2, |z| <= 1, r falling linearly from 1 to `taper`;
ELLIPSOID |p| <= 1.
Letters: M parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from cpq_train.simulator.geometry import Array, IntArray

BOX, FRUSTUM, ELLIPSOID = 0, 1, 2


@dataclass(frozen=True)
class Material:
    """How a surface answers the laser.

    Attributes:
        name: What the code calls it.
        intensity: Median of the returned intensity, 0 to 255.
        spread: Standard deviation of its logarithm.
        range_noise_m: Standard deviation of the measured range.
        dropout: Share of the rays that come back empty.
        density_per_m: A porous solid stops a ray after a random way with this rate; 0 for an opaque one.
    """

    name: str
    intensity: float
    spread: float = 0.4
    range_noise_m: float = 0.015
    dropout: float = 0.01
    density_per_m: float = 0.0


MATERIALS: tuple[Material, ...] = (
    Material("ground", 11.0, 0.45, 0.018, 0.005),
    Material("paint", 18.0, 0.8, 0.015, 0.03),
    Material("dark_paint", 5.0, 0.8, 0.02, 0.10),
    Material("glass", 6.0, 0.7, 0.03, 0.45),
    Material("rubber", 4.0, 0.4, 0.02, 0.10),
    Material("metal", 24.0, 0.7, 0.015, 0.03),
    Material("tarpaulin", 32.0, 0.4, 0.015, 0.01),
    Material("cloth", 14.0, 0.6, 0.02, 0.03),
    Material("skin", 22.0, 0.3, 0.015, 0.03),
    Material("concrete", 20.0, 0.3, 0.015, 0.01),
    Material("plastic", 26.0, 0.4, 0.015, 0.02),
    Material("reflective", 85.0, 0.6, 0.02, 0.01),
    Material("facade", 22.0, 0.5, 0.05, 0.04),
    Material("bark", 13.0, 0.4, 0.02, 0.02),
    Material("leaves", 15.0, 0.5, 0.03, 0.05, 0.9),
    Material("spokes", 8.0, 0.6, 0.02, 0.05, 6.0),
)
MATERIAL_ID: dict[str, int] = {material.name: index for index, material in enumerate(MATERIALS)}


@dataclass(frozen=True)
class Parts:
    """M parts as columns.

    Attributes:
        kind: (M,) BOX, FRUSTUM or ELLIPSOID.
        center: (M, 3) metres.
        half: (M, 3) half extents along the part's own axes.
        yaw: (M,) heading of the part's x axis.
        taper: (M,) top radius over bottom radius of a frustum.
        material: (M,) index into MATERIALS.
        owner: (M,) index of the object the part belongs to, -1 for surroundings.
    """

    kind: IntArray
    center: Array
    half: Array
    yaw: Array
    taper: Array
    material: IntArray
    owner: IntArray

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, rows: IntArray) -> Parts:
        """The parts of the given rows."""
        return Parts(*(getattr(self, f.name)[rows] for f in fields(self)))

    def moved(self, x: Array, y: Array, z: Array, yaw: Array) -> Parts:
        """Parts given in a frame, placed in the world by each part's (M,) frame pose."""
        cos, sin = np.cos(yaw), np.sin(yaw)
        center = np.stack(
            [
                x + cos * self.center[:, 0] - sin * self.center[:, 1],
                y + sin * self.center[:, 0] + cos * self.center[:, 1],
                z + self.center[:, 2],
            ],
            axis=1,
        )
        return Parts(self.kind, center, self.half, self.yaw + yaw, self.taper, self.material, self.owner)


@dataclass(frozen=True)
class Part:
    """One part, in the frame of whatever it belongs to."""

    kind: int
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    material: str
    yaw: float = 0.0
    taper: float = 1.0


def collect(parts: Sequence[Part], owners: Sequence[int]) -> Parts:
    """Columns of a list of parts, each with the object that owns it."""
    return Parts(
        kind=np.array([p.kind for p in parts], dtype=np.int64),
        center=np.array([p.center for p in parts], dtype=np.float64).reshape(-1, 3),
        half=np.array([p.half for p in parts], dtype=np.float64).reshape(-1, 3),
        yaw=np.array([p.yaw for p in parts], dtype=np.float64),
        taper=np.array([p.taper for p in parts], dtype=np.float64),
        material=np.array([MATERIAL_ID[p.material] for p in parts], dtype=np.int64),
        owner=np.array(owners, dtype=np.int64),
    )


def concatenate(groups: Sequence[Parts]) -> Parts:
    """All parts of several groups."""
    return Parts(*(np.concatenate([getattr(g, f.name) for g in groups]) for f in fields(Parts)))
