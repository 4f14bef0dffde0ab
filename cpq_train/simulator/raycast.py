"""Casting a whole sweep at all parts at once.

Each part is tested only against the rays of its angular window, a block of columns and rings; the windows of
all parts are laid out as one flat list of (part, ray) pairs, so that the cost is a few passes over arrays.
Letters: M parts, R rays, Q pairs.
"""

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.geometry import Array, BoolArray, IntArray, rotate, wrap_angle
from cpq_train.simulator.parts import BOX, ELLIPSOID, FRUSTUM, MATERIALS, Parts
from cpq_train.simulator.sensor import (
    FIRING_SPREAD_RAD,
    HIGHEST_RAD,
    LOWEST_RAD,
    MAX_RANGE_M,
    MIN_RANGE_M,
    NUM_RINGS,
    Rays,
)

RING_STEP_RAD = (HIGHEST_RAD - LOWEST_RAD) / (NUM_RINGS - 1)
ELEVATION_MARGIN_RAD = 0.012
MAX_TILT_RAD = 0.07
"""The sensor leans against the world's vertical by less than this."""
_DENSITY = np.array([m.density_per_m for m in MATERIALS])
_CORNERS = np.array([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])


@dataclass(frozen=True)
class Hits:
    """Outcome of a cast.

    Attributes:
        range_r: (R,) metres to the first surface, inf where nothing is met.
        part_r: (R,) index of the part met, -1 for the ground or nothing.
        pair_ray: (Q,) rays of all (part, ray) pairs that would meet if nothing else stood in the way.
        pair_part: (Q,) parts of those pairs.
    """

    range_r: Array
    part_r: IntArray
    pair_ray: IntArray
    pair_part: IntArray


@dataclass(frozen=True)
class _Frame:
    """Parts as seen from the sensor: its position and scale in each part's unit frame."""

    origin_m3: Array
    cos_m: Array
    sin_m: Array


def cast(
    parts: Parts,
    rays: Rays,
    directions_r3: Array,
    origin_3: Array,
    to_world_33: Array,
    ground_range_r: Array,
    rng: np.random.Generator,
) -> Hits:
    """First surface that each ray meets.

    Args:
        parts: Parts in the world frame.
        rays: Rays in the sensor frame.
        directions_r3: Their directions in the world.
        origin_3: Position of the sensor in the world.
        to_world_33: Rotation from the sensor frame to the world.
        ground_range_r: (R,) range of the ground along each ray, inf for none.
        rng: Decides where a ray ends within porous parts.
    """
    frame = _frame(parts, origin_3)
    part_q, ray_q = _pairs(parts, frame, rays, origin_3, to_world_33)
    enter, leave = _intersect(parts, frame, part_q, directions_r3[ray_q])
    hit = (enter < leave) & (enter > MIN_RANGE_M) & (enter < MAX_RANGE_M)
    part_q, ray_q, enter, leave = part_q[hit], ray_q[hit], enter[hit], leave[hit]
    enter = _stop_in_porous(_DENSITY[parts.material[part_q]], enter, leave, rng)
    range_r = ground_range_r.copy()
    np.minimum.at(range_r, ray_q, enter)
    part_r = np.full(len(range_r), -1, dtype=np.int64)
    stops = np.isfinite(enter)
    first = stops & (enter == range_r[ray_q])
    part_r[ray_q[first]] = part_q[first]
    return Hits(range_r, part_r, ray_q[stops], part_q[stops])


def _frame(parts: Parts, origin_3: Array) -> _Frame:
    cos, sin = np.cos(parts.yaw), np.sin(parts.yaw)
    delta = origin_3 - parts.center
    local = np.stack(
        [cos * delta[:, 0] + sin * delta[:, 1], cos * delta[:, 1] - sin * delta[:, 0], delta[:, 2]], axis=1
    )
    return _Frame(local / parts.half, cos, sin)


def _stop_in_porous(density: Array, enter: Array, leave: Array, rng: np.random.Generator) -> Array:
    """Ranges where rays end; inf for a ray that passes through a porous part."""
    porous = np.flatnonzero(density)
    way = rng.exponential(1.0, len(porous)) / density[porous]
    end = enter[porous] + way
    stopped = enter.copy()
    stopped[porous] = np.where(end < leave[porous], end, np.inf)
    return stopped


def _pairs(
    parts: Parts, frame: _Frame, rays: Rays, origin_3: Array, to_world_33: Array
) -> tuple[IntArray, IntArray]:
    """Parts and rays (Q,) of every angular window."""
    corners = _CORNERS * parts.half[:, None, :]
    turned = np.stack(
        [
            frame.cos_m[:, None] * corners[..., 0] - frame.sin_m[:, None] * corners[..., 1],
            frame.sin_m[:, None] * corners[..., 0] + frame.cos_m[:, None] * corners[..., 1],
            corners[..., 2],
        ],
        axis=-1,
    )
    seen = rotate(turned + (parts.center - origin_3)[:, None, :], to_world_33.T)
    first_col, num_cols, width = _column_windows(seen, frame, rays)
    first_ring, num_rings = _ring_windows(parts, frame, origin_3, to_world_33, width)
    count = np.where(num_rings > 0, num_cols * num_rings, 0)
    part_q = np.repeat(np.arange(len(parts)), count)
    within = np.arange(len(part_q)) - np.repeat(np.cumsum(count) - count, count)
    column = (first_col[part_q] + within // num_rings[part_q]) % rays.num_columns
    ring = first_ring[part_q] + within % num_rings[part_q]
    return part_q, column * NUM_RINGS + ring


def _column_windows(corners_m83: Array, frame: _Frame, rays: Rays) -> tuple[IntArray, IntArray, Array]:
    """First column, number of columns and half width in radians of each part."""
    middle = corners_m83.mean(axis=1)
    center = np.arctan2(middle[:, 1], middle[:, 0])
    offset = wrap_angle(np.arctan2(corners_m83[..., 1], corners_m83[..., 0]) - center[:, None])
    step = rays.azimuth_step_rad
    low = (rays.first_azimuth_rad - center - offset.max(axis=1) - FIRING_SPREAD_RAD) / step
    high = (rays.first_azimuth_rad - center - offset.min(axis=1)) / step
    first = np.floor(low).astype(np.int64)
    number = np.ceil(high).astype(np.int64) - first + 1
    around = (np.abs(frame.origin_m3[:, :2]) < 1.1).all(axis=1)
    number = np.where(around | (number > rays.num_columns), rays.num_columns, number)
    return first, number, np.where(around, np.pi, np.abs(offset).max(axis=1))


def _ring_windows(
    parts: Parts, frame: _Frame, origin_3: Array, to_world_33: Array, width_m: Array
) -> tuple[IntArray, IntArray]:
    """First ring and number of rings (0 where no ray can meet the part)."""
    reach = np.maximum(np.abs(frame.origin_m3[:, :2]) - 1, 0) * parts.half[:, :2]
    near = np.maximum(np.hypot(reach[:, 0], reach[:, 1]), 1e-3)
    far = near + 2 * np.hypot(parts.half[:, 0], parts.half[:, 1])
    bottom = parts.center[:, 2] - parts.half[:, 2] - origin_3[2]
    top = bottom + 2 * parts.half[:, 2]
    lowest = np.arctan2(bottom, np.where(bottom < 0, near, far))
    highest = np.arctan2(top, np.where(top > 0, near, far))
    heading = parts.center[:, :2] - origin_3[:2]
    heading = heading / np.maximum(np.hypot(heading[:, 0], heading[:, 1]), 1e-6)[:, None]
    lean = np.arcsin(heading[:, 0] * to_world_33[0, 2] + heading[:, 1] * to_world_33[1, 2])
    margin = ELEVATION_MARGIN_RAD + MAX_TILT_RAD * np.minimum(width_m, 2.0)
    first = np.ceil((lowest + lean - margin - LOWEST_RAD) / RING_STEP_RAD).clip(0, NUM_RINGS)
    last = np.floor((highest + lean + margin - LOWEST_RAD) / RING_STEP_RAD).clip(-1, NUM_RINGS - 1)
    return first.astype(np.int64), np.maximum(last - first + 1, 0).astype(np.int64)


def _intersect(parts: Parts, frame: _Frame, part_q: IntArray, directions_q3: Array) -> tuple[Array, Array]:
    """Ranges (Q,) where each ray enters and leaves its part; enter > leave where it misses."""
    cos, sin, half = frame.cos_m[part_q], frame.sin_m[part_q], parts.half[part_q]
    dx = (cos * directions_q3[:, 0] + sin * directions_q3[:, 1]) / half[:, 0]
    dy = (cos * directions_q3[:, 1] - sin * directions_q3[:, 0]) / half[:, 1]
    dz = directions_q3[:, 2] / half[:, 2]
    origin = frame.origin_m3[part_q]
    enter, leave = _slab(origin[:, 2], dz)
    kind = parts.kind[part_q]
    flat = kind == BOX
    for o, d in ((origin[flat, 0], dx[flat]), (origin[flat, 1], dy[flat])):
        first, second = _slab(o, d)
        enter[flat] = np.maximum(enter[flat], first)
        leave[flat] = np.minimum(leave[flat], second)
    for round_kind in (FRUSTUM, ELLIPSOID):
        rows = np.flatnonzero(kind == round_kind)
        taper = parts.taper[part_q[rows]]
        first, second = _quadric(origin[rows], dx[rows], dy[rows], dz[rows], taper, round_kind == ELLIPSOID)
        enter[rows] = np.maximum(enter[rows], first)
        leave[rows] = np.minimum(leave[rows], second)
    return enter, leave


def _slab(origin: Array, direction: Array) -> tuple[Array, Array]:
    inverse = 1.0 / np.where(np.abs(direction) < 1e-9, 1e-9, direction)
    first, second = (-1.0 - origin) * inverse, (1.0 - origin) * inverse
    return np.minimum(first, second), np.maximum(first, second)


def _quadric(
    origin: Array, dx: Array, dy: Array, dz: Array, taper: Array, is_ellipsoid: bool
) -> tuple[Array, Array]:
    """Interval inside x^2 + y^2 <= (radius - fall * z)^2, or inside the unit sphere."""
    ox, oy, oz = origin.T
    a, b, c = dx * dx + dy * dy, ox * dx + oy * dy, ox * ox + oy * oy
    if is_ellipsoid:
        a, b, c = a + dz * dz, b + oz * dz, c + oz * oz - 1
    else:
        radius, fall = (1 + taper) / 2, (1 - taper) / 2
        slope, start = -fall * dz, radius - fall * oz
        a, b, c = a - slope * slope, b - slope * start, c - start * start
    root = b * b - a * c
    width = np.sqrt(np.maximum(root, 0)) / a
    return np.where(root > 0, -b / a - width, np.inf), np.where(root > 0, -b / a + width, -np.inf)


def surface_rays(hits: Hits, owner_m: IntArray, num_owners: int) -> tuple[IntArray, IntArray]:
    """Rays per object (num_owners,) that would meet it alone, and rays that meet it first."""
    owner_q = owner_m[hits.pair_part]
    rows: BoolArray = owner_q >= 0
    num_rays = len(hits.range_r)
    pairs = np.unique(owner_q[rows] * num_rays + hits.pair_ray[rows])
    alone = np.bincount(pairs // num_rays, minlength=num_owners)
    met = np.where(hits.part_r >= 0, owner_m[hits.part_r], -1)
    return alone, np.bincount(met[met >= 0], minlength=num_owners)
