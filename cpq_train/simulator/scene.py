"""One scene, from its seed to its files and table rows.

Letters: T sweep times, N actors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpq_train.common.folders import numbering_errors
from cpq_train.simulator.geometry import Array, IntArray
from cpq_train.simulator.scan import Scan, scan
from cpq_train.simulator.sensor import SWEEP_PERIOD_US
from cpq_train.simulator.tables import (
    ANNOTATED_RANGE_M,
    CHANNEL,
    LOCATIONS,
    Annotator,
    Row,
    Tables,
    link,
    points_in_boxes,
    token,
    visibility_token,
)
from cpq_train.simulator.world import World, draw_world

NUM_LEAD_SWEEPS = 10
"""Sweeps before the first key frame, so that it too has its nine past ones."""
SWEEPS_PER_SAMPLE = 10
CLOUD_BYTES = 700_000
"""Of a cloud's file, about."""
FIRST_TIMESTAMP_US = 1_532_000_000_000_000


@dataclass(frozen=True)
class SceneTask:
    """What a worker needs to know.

    Attributes:
        root: Data root to write clouds to.
        name: Official scene name.
        seed: Seed of the data set.
        num_samples: Key frames.
    """

    root: Path
    name: str
    seed: int
    num_samples: int


def num_sweeps(num_samples: int) -> int:
    """Sweeps of a scene of so many key frames."""
    return NUM_LEAD_SWEEPS + SWEEPS_PER_SAMPLE * (num_samples - 1) + 1


def simulate_scene(task: SceneTask) -> Tables:
    """Writes a scene's clouds and returns its table rows.

    The outcome depends on the scene's name, the seed and the number of samples alone.
    """
    return _SceneWriter(task).run()


class _SceneWriter:
    def __init__(self, task: SceneTask) -> None:
        self.task = task
        self.key = f"{task.seed}/{task.name}"
        digest = hashlib.sha256(self.key.encode()).digest()
        self.entropy = int.from_bytes(digest[:8], "little")
        rng = np.random.default_rng([self.entropy, 0])
        self.timestamps_us = self._draw_timestamps(rng, num_sweeps(task.num_samples))
        self.times_s = (self.timestamps_us - self.timestamps_us[0]) * 1e-6
        self.offset = np.array([*np.round(rng.uniform(300, 2000, 2), 3), 0.0])
        """Where the scene's own origin lies on the map."""
        self.location = LOCATIONS[int(rng.integers(len(LOCATIONS)))]
        self.world: World = draw_world(rng, self.times_s)
        self.annotator = Annotator(self.key, self.world.actors, self.times_s)
        self.samples = [token(self.key, "sample", i) for i in range(task.num_samples)]

    def _draw_timestamps(self, rng: np.random.Generator, num: int) -> IntArray:
        start = FIRST_TIMESTAMP_US + int(rng.integers(10**8)) * 10**6
        return start + SWEEP_PERIOD_US * np.arange(num) + rng.integers(-300, 301, num)

    def run(self) -> Tables:
        sweeps = [self._sweep(t) for t in range(len(self.times_s))]
        link(sweeps)
        annotations, instances = self.annotator.finish()
        return {
            "log": [self._log()],
            "calibrated_sensor": [self._calibrated_sensor()],
            "ego_pose": [self._ego_pose(t) for t in range(len(self.times_s))],
            "scene": [self._scene()],
            "sample": self._samples(),
            "sample_data": sweeps,
            "sample_annotation": annotations,
            "instance": instances,
        }

    @staticmethod
    def _key_sweep(sample: int) -> int:
        return NUM_LEAD_SWEEPS + SWEEPS_PER_SAMPLE * sample

    def _sweep(self, t: int) -> Row:
        """Takes, writes and (at a key frame) annotates a sweep; its row of sample_data."""
        after_first = max(t - NUM_LEAD_SWEEPS, 0)
        sample, is_key = (
            -(-after_first // SWEEPS_PER_SAMPLE),
            self._key_sweep(after_first // SWEEPS_PER_SAMPLE) == t,
        )
        taken = scan(self.world, t, np.random.default_rng([self.entropy, 1, t]), count_rays=is_key)
        folder = "samples" if is_key else "sweeps"
        filename = f"{folder}/{CHANNEL}/{self.task.name}__{CHANNEL}__{self.timestamps_us[t]}.pcd.bin"
        with numbering_errors():
            taken.points.tofile(self.task.root / filename)
        if is_key:
            self._annotate(t, sample, taken)
        return {
            "token": token(self.key, "sweep", t),
            "sample_token": self.samples[sample],
            "ego_pose_token": token(self.key, "sweep", t),
            "calibrated_sensor_token": token(self.key, "calibrated_sensor"),
            "timestamp": int(self.timestamps_us[t]),
            "fileformat": "pcd",
            "is_key_frame": is_key,
            "height": 0,
            "width": 0,
            "filename": filename,
            "prev": "",
            "next": "",
        }

    def _annotate(self, t: int, sample: int, taken: Scan) -> None:
        world = self.world
        ego = world.ego_translation_t3[t, :2]
        near = [
            n
            for n, actor in enumerate(world.actors)
            if np.hypot(*(actor.poses_t3[t, :2] - ego)) < ANNOTATED_RANGE_M
        ]
        centers = np.round(np.array([world.box_center(n, t) for n in near]).reshape(-1, 3) + self.offset, 3)
        sizes = np.array([world.actors[n].size_m for n in near]).reshape(-1, 3)
        yaws: Array = np.array([world.actors[n].poses_t3[t, 2] for n in near])
        origin, to_world = world.sensor_pose(t)
        counts = points_in_boxes(taken.points, centers - self.offset, sizes, yaws, origin, to_world)
        for n, center, count in zip(near, centers, counts, strict=True):
            level = visibility_token(int(taken.met_n[n]), int(taken.alone_n[n]))
            self.annotator.add(n, t, self.samples[sample], center, int(count), level)

    def _log(self) -> Row:
        return {
            "token": token(self.key, "log"),
            "logfile": f"simulated-{self.task.name}",
            "vehicle": "simulated",
            "date_captured": "2018-07-19",
            "location": self.location,
        }

    def _calibrated_sensor(self) -> Row:
        return {
            "token": token(self.key, "calibrated_sensor"),
            "sensor_token": token("sensor", CHANNEL),
            "translation": self.world.mount_translation_3.tolist(),
            "rotation": self.world.mount_rotation_4.tolist(),
            "camera_intrinsic": [],
        }

    def _ego_pose(self, t: int) -> Row:
        return {
            "token": token(self.key, "sweep", t),
            "timestamp": int(self.timestamps_us[t]),
            "rotation": self.world.ego_rotation_t4[t].tolist(),
            "translation": (self.world.ego_translation_t3[t] + self.offset).tolist(),
        }

    def _scene(self) -> Row:
        return {
            "token": token(self.key, "scene"),
            "log_token": token(self.key, "log"),
            "nbr_samples": len(self.samples),
            "first_sample_token": self.samples[0],
            "last_sample_token": self.samples[-1],
            "name": self.task.name,
            "description": "Simulated",
        }

    def _samples(self) -> list[Row]:
        rows = [
            {
                "token": name,
                "timestamp": int(self.timestamps_us[self._key_sweep(i)]),
                "prev": "",
                "next": "",
                "scene_token": token(self.key, "scene"),
            }
            for i, name in enumerate(self.samples)
        ]
        link(rows)
        return rows
