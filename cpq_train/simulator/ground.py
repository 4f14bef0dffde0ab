"""The ground: a gentle slope with long, shallow waves, and the ray's way to it."""

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.geometry import Array

LONGEST_LAST_STEP_M = 2.0


@dataclass(frozen=True)
class Ground:
    """Height z(x, y) = slope . (x, y) + sum over K waves of amplitude * sin(wave vector . (x, y) + phase)."""

    slope_2: Array
    amplitude_k: Array
    wave_k2: Array
    phase_k: Array

    def height(self, x: Array, y: Array) -> Array:
        """Height in metres at points given by two arrays of one shape."""
        return self.height_and_gradient(x, y)[0]

    def height_and_gradient(self, x: Array, y: Array) -> tuple[Array, Array, Array]:
        """Height and its derivatives along x and y."""
        slope_x, slope_y = self.slope_2.tolist()
        height = slope_x * x + slope_y * y
        along_x, along_y = np.full_like(height, slope_x), np.full_like(height, slope_y)
        for amplitude, (kx, ky), phase in zip(
            self.amplitude_k.tolist(), self.wave_k2.tolist(), self.phase_k.tolist(), strict=True
        ):
            angle = kx * x + ky * y + phase
            height += amplitude * np.sin(angle)
            swing = amplitude * np.cos(angle)
            along_x += swing * kx
            along_y += swing * ky
        return height, along_x, along_y

    def cast(self, origin_3: Array, directions_r3: Array, max_range_m: float) -> Array:
        """Range at which each ray meets the ground, inf for none.

        Two Newton steps from the tangent plane; grazing rays whose second step is still long are lost.
        """
        range_r = np.full(len(directions_r3), np.inf)
        height, gx, gy = (float(v[0]) for v in self.height_and_gradient(origin_3[:1], origin_3[1:2]))
        sink = directions_r3[:, 2] - gx * directions_r3[:, 0] - gy * directions_r3[:, 1]
        rows = np.flatnonzero(sink < -(origin_3[2] - height) / (1.5 * max_range_m))
        dx, dy, dz = directions_r3[rows].T
        t, step = -(origin_3[2] - height) / sink[rows], np.zeros(len(rows))
        for _ in range(2):
            # Single precision halves the cost and errs by less than a tenth of a millimetre.
            x, y = (origin_3[0] + t * dx).astype(np.float32), (origin_3[1] + t * dy).astype(np.float32)
            level, gx_t, gy_t = self.height_and_gradient(x, y)
            step = (origin_3[2] + t * dz - level) / np.minimum(dz - gx_t * dx - gy_t * dy, -1e-3)
            t = t - step
        met = (t > 0) & (t < max_range_m) & (np.abs(step) < LONGEST_LAST_STEP_M)
        range_r[rows] = np.where(met, t, np.inf)
        return range_r


def draw_ground(rng: np.random.Generator) -> Ground:
    """A ground whose slope stays within about 3 %."""
    num_waves = 3
    length_m, heading = rng.uniform(45, 130, num_waves), rng.uniform(0, 2 * np.pi, num_waves)
    wave = 2 * np.pi / length_m[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    return Ground(
        slope_2=rng.normal(0, 0.006, 2),
        amplitude_k=rng.uniform(0.02, 0.0016 * length_m),
        wave_k2=wave,
        phase_k=rng.uniform(0, 2 * np.pi, num_waves),
    )
