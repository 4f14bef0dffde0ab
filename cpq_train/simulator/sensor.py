"""The LiDAR of the nuScenes car: rays, mounting, and the part of the car that it sees.

Sensor frame: x right, y forward, z up. Ego frame: x forward, y left, origin on the ground, rear axle.
Numbers of rays, order of the points, mounting and ego returns were read from real nuScenes clouds.
"""

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.geometry import (
    Array,
    BoolArray,
    multiply_quaternions,
    yaw_pitch_roll_quaternion,
)

NUM_RINGS = 32
LOWEST_RAD, HIGHEST_RAD = np.radians(-30.67), np.radians(10.67)
NUM_COLUMNS_MEAN = 1085
FIRING_SPREAD_RAD = np.radians(0.26)
"""The head turns by this angle between the first and the last beam of a column."""
SWEEP_PERIOD_US = 50_000
MAX_RANGE_M = 100.0
MIN_RANGE_M = 1.2

MOUNT_TRANSLATION_M = (0.943713, 0.0, 1.84023)
MOUNT_ROTATION_WXYZ = (0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817)

ROOF_DEPTH_M = 0.335
ROOF_HALF_AXES_M = (0.545, 0.93)
"""Half axes (x, y of the sensor frame) of the ellipse that the car's roof fills below the sensor."""


@dataclass(frozen=True)
class Rays:
    """Rays of one sweep in file order: firing by firing, ring 0 (lowest) to 31 within each."""

    directions_r3: Array
    num_columns: int
    first_azimuth_rad: float

    @property
    def azimuth_step_rad(self) -> float:
        """Angle between two firings."""
        return 2 * np.pi / self.num_columns


def make_rays(rng: np.random.Generator) -> Rays:
    """Rays of one turn, clockwise from about -x (left); the number of firings varies by one as in reality."""
    num_columns = NUM_COLUMNS_MEAN + int(rng.integers(-1, 3))
    step = 2 * np.pi / num_columns
    first = np.pi - rng.uniform(0.0, np.radians(2.0))
    elevation = np.linspace(LOWEST_RAD, HIGHEST_RAD, NUM_RINGS)
    lag = np.linspace(0.0, FIRING_SPREAD_RAD, NUM_RINGS)
    azimuth = first - step * np.arange(num_columns)[:, None] - lag[None, :]
    directions = np.stack(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation) + 0 * azimuth,
        ],
        axis=-1,
    )
    return Rays(directions.reshape(-1, 3), num_columns, first)


def ego_returns(directions_r3: Array) -> tuple[BoolArray, Array]:
    """Which rays meet the car's own roof, and at what range in metres."""
    down = np.minimum(directions_r3[:, 2], -1e-6)
    range_m = -ROOF_DEPTH_M / down
    x, y = range_m * directions_r3[:, 0], range_m * directions_r3[:, 1]
    a, b = ROOF_HALF_AXES_M
    return (x / a) ** 2 + (y / b) ** 2 < 1.0, range_m


def draw_mounting(rng: np.random.Generator) -> tuple[Array, Array]:
    """Sensor-to-ego translation (3,) and quaternion (4,): the real calibration, slightly varied."""
    translation = np.array(MOUNT_TRANSLATION_M) + rng.normal(0, (0.02, 0.0, 0.002))
    wobble = yaw_pitch_roll_quaternion(*(float(v) for v in rng.normal(0, np.radians(0.3), 3)))
    return translation, multiply_quaternions(wobble, np.array(MOUNT_ROTATION_WXYZ))
