"""One sweep: from rays to the cloud that the sensor's file would hold.

Every ray makes a point, as in nuScenes' files: a ray that comes back empty is a point at range 0, which the
motion compensation of the real files spreads along the way of the car. Apart from that the sweep is taken at
one instant, as if motion compensation were perfect.
Letters: R rays.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpq_train.simulator.geometry import Array, BoolArray, IntArray, rotate
from cpq_train.simulator.parts import MATERIAL_ID, MATERIALS
from cpq_train.simulator.raycast import cast, surface_rays
from cpq_train.simulator.sensor import MAX_RANGE_M, NUM_RINGS, Rays, ego_returns, make_rays
from cpq_train.simulator.world import World

_INTENSITY = np.array([m.intensity for m in MATERIALS])
_SPREAD = np.array([m.spread for m in MATERIALS])
_NOISE = np.array([m.range_noise_m for m in MATERIALS])
_DROPOUT = np.array([m.dropout for m in MATERIALS])
FADE_FROM_M = 30.0
EGO_INTENSITY = 6.0
ROOF_ROUGHNESS = 0.01
"""Relative spread of the range of ego returns."""


@dataclass(frozen=True)
class Scan:
    """A sweep.

    Attributes:
        points: (R, 5) float32 x, y, z (sensor frame, metres), intensity 0 to 255, ring 0 to 31.
        alone_n: (N,) rays that would meet each actor if nothing stood in the way.
        met_n: (N,) rays that meet it.
    """

    points: npt.NDArray[np.float32]
    alone_n: IntArray
    met_n: IntArray


def scan(world: World, t: int, rng: np.random.Generator, count_rays: bool) -> Scan:
    """Takes sweep `t`; `count_rays` asks for the counts that measure occlusion."""
    rays = make_rays(rng)
    origin, to_world = world.sensor_pose(t)
    directions = rotate(rays.directions_r3, to_world)
    ground = world.ground.cast(origin, directions, MAX_RANGE_M)
    parts = world.parts_at(t)
    hits = cast(parts, rays, directions, origin, to_world, ground, rng)
    material = np.where(hits.part_r >= 0, parts.material[hits.part_r], MATERIAL_ID["ground"])
    intensity = np.clip(
        _INTENSITY[material] * np.exp(_SPREAD[material] * rng.standard_normal(len(material))), 0, 255
    )
    range_m = hits.range_r + _NOISE[material] * rng.standard_normal(len(material))
    empty = _is_lost(hits.range_r, intensity, material, rng)
    num = len(world.actors)
    alone, met = (
        surface_rays(hits, parts.owner, num) if count_rays else (np.zeros(num, int), np.zeros(num, int))
    )
    return Scan(_cloud(rays, range_m, intensity, empty, _ego_step(world, t), rng), alone, met)


def _is_lost(range_r: Array, intensity: Array, material: IntArray, rng: np.random.Generator) -> BoolArray:
    """Rays without a return: nothing met, or lost at random, the more so far away on dull surfaces."""
    fade = np.clip((range_r - FADE_FROM_M) / (MAX_RANGE_M - FADE_FROM_M), 0, 1) * np.exp(-intensity / 40)
    chance = 1 - (1 - _DROPOUT[material]) * (1 - 0.9 * fade)
    lost: BoolArray = ~np.isfinite(range_r) | (rng.random(len(range_r)) < chance)
    return lost


def _ego_step(world: World, t: int) -> Array:
    """How far the ego vehicle moves during the sweep, in the sensor frame, (3,)."""
    before = max(t - 1, 0)
    step = world.ego_translation_t3[before + 1] - world.ego_translation_t3[before]
    return rotate(step, world.sensor_pose(t)[1].T)


def _cloud(rays: Rays, range_r: Array, intensity: Array, empty: BoolArray, step_3: Array,
           rng: np.random.Generator) -> npt.NDArray[np.float32]:  # fmt: skip
    num = len(range_r)
    roof, roof_range = ego_returns(rays.directions_r3)
    empty = empty & ~roof
    range_m = np.where(roof, roof_range, range_r)
    range_m[roof] *= rng.normal(1, ROOF_ROUGHNESS, roof.sum())
    range_m[empty] = 0.0
    xyz = rays.directions_r3 * range_m[:, None]
    lag = 1 - (np.flatnonzero(empty) // NUM_RINGS + 1) / rays.num_columns
    xyz[empty] = -step_3 * lag[:, None] + rng.normal(0, 0.002, (len(lag), 3))
    near = roof | empty
    intensity[near] = np.minimum(EGO_INTENSITY * np.exp(0.7 * rng.standard_normal(near.sum())), 255)
    points = np.empty((num, 5), dtype=np.float32)
    points[:, :3], points[:, 3] = xyz, np.round(intensity)
    points[:, 4] = np.tile(np.arange(NUM_RINGS), rays.num_columns)
    return points
