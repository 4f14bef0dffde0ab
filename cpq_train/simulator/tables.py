"""The rows of nuScenes' tables that a simulated scene fills, and those that all scenes share.

The 13 tables and their columns are those that nuscenes-devkit 1.2.0 reads.
Letters: P points, N actors, T sweep times.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cpq_train.common.nuscenes import ATTRIBUTES, BIKE_RACK_CATEGORY, CATEGORY_TO_CLASS
from cpq_train.simulator.actors import Actor
from cpq_train.simulator.geometry import (
    Array,
    IntArray,
    quaternion_to_matrix,
    rotate,
    yaw_pitch_roll_quaternion,
)

Row = dict[str, Any]
Tables = dict[str, list[Row]]

SCENE_TABLES = (
    "log", "calibrated_sensor", "ego_pose", "scene", "sample", "sample_data", "sample_annotation", "instance",
)  # fmt: skip
LOCATIONS = ("boston-seaport", "singapore-onenorth", "singapore-queenstown", "singapore-hollandvillage")
CHANNEL = "LIDAR_TOP"
IGNORED_CATEGORIES = (
    "animal",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    BIKE_RACK_CATEGORY,
)
CATEGORIES = (*sorted(CATEGORY_TO_CLASS), *IGNORED_CATEGORIES)
VISIBILITY_LEVELS = ("v0-40", "v40-60", "v60-80", "v80-100")
VISIBILITY_EDGES = (0.4, 0.6, 0.8)
MOVING_MPS = 0.2
ANNOTATED_RANGE_M = 80.0


def token(*names: object) -> str:
    """A token of 32 hexadecimal digits, the same for the same names."""
    return hashlib.md5("/".join(map(str, names)).encode(), usedforsecurity=False).hexdigest()


def shared_tables(logs: list[Row]) -> Tables:
    """Categories, attributes, visibility levels, the sensor, and one map per location of the given logs."""
    return {
        "category": [
            {"token": token("category", name), "name": name, "description": "", "index": index + 1}
            for index, name in enumerate(CATEGORIES)
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": ""} for name in ATTRIBUTES
        ],
        "visibility": [
            {"token": str(index + 1), "level": level, "description": f"visible share {level[1:]} %"}
            for index, level in enumerate(VISIBILITY_LEVELS)
        ],
        "sensor": [{"token": token("sensor", CHANNEL), "channel": CHANNEL, "modality": "lidar"}],
        "map": [
            {
                "token": token("map", place),
                "category": "semantic_prior",
                "filename": f"maps/{token('map', place)}.png",
                "log_tokens": [log["token"] for log in logs if log["location"] == place],
            }
            for place in sorted({log["location"] for log in logs})
        ],
    }


def attribute_name(category: str, state: str, speed_mps: float) -> str | None:
    """The attribute that follows from motion: `state` names what the object does when it does not move."""
    moves = speed_mps > MOVING_MPS
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        return f"cycle.{state}"
    if category.startswith("vehicle."):
        return "vehicle.moving" if moves else f"vehicle.{state}"
    if CATEGORY_TO_CLASS.get(category) == "pedestrian":
        return "pedestrian.moving" if moves else f"pedestrian.{state}"
    return None


def visibility_token(num_met: int, num_alone: int) -> str:
    """Level of the share of an object's rays that nothing else stops."""
    share = num_met / num_alone if num_alone else 0.0
    return str(1 + int(np.searchsorted(VISIBILITY_EDGES, share, side="right")))


def speeds(poses_t3: Array, times_s: Array) -> Array:
    """Speed (T,) in metres per second."""
    if len(times_s) < 2:
        return np.zeros(len(times_s))
    velocity = np.gradient(poses_t3[:, :2], times_s, axis=0)
    return np.asarray(np.hypot(velocity[:, 0], velocity[:, 1]))


class Annotator:
    """Collects one scene's annotations: which objects were seen at which key frames, and how well."""

    def __init__(self, scene_key: str, actors: list[Actor], times_s: Array) -> None:
        self._key, self._actors = scene_key, actors
        self._speeds = [speeds(actor.poses_t3, times_s) for actor in actors]
        self._rows: dict[int, list[Row]] = {n: [] for n in range(len(actors))}

    def add(
        self, actor: int, sweep: int, sample: str, center: Array, num_points: int, visibility: str
    ) -> None:
        """Notes an object at a key frame; sweeps must come in order."""
        who = self._actors[actor]
        name = attribute_name(who.category, who.state, float(self._speeds[actor][sweep]))
        length, width, height = who.size_m
        self._rows[actor].append(
            {
                "token": token(self._key, "annotation", actor, sweep),
                "sample_token": sample,
                "instance_token": token(self._key, "instance", actor),
                "visibility_token": visibility,
                "attribute_tokens": [token("attribute", name)] if name else [],
                "translation": center.tolist(),
                "size": [width, length, height],
                "rotation": yaw_pitch_roll_quaternion(float(who.poses_t3[sweep, 2])).tolist(),
                "prev": "",
                "next": "",
                "num_lidar_pts": num_points,
                "num_radar_pts": 0,
            }
        )

    def finish(self) -> tuple[list[Row], list[Row]]:
        """Annotations and instances: each object from the first to the last key frame where it has points."""
        annotations, instances = [], []
        for actor, rows in self._rows.items():
            seen = [k for k, row in enumerate(rows) if row["num_lidar_pts"] > 0]
            if not seen:
                continue
            chain = rows[seen[0] : seen[-1] + 1]
            link(chain)
            annotations += chain
            instances.append(
                {
                    "token": chain[0]["instance_token"],
                    "category_token": token("category", self._actors[actor].category),
                    "nbr_annotations": len(chain),
                    "first_annotation_token": chain[0]["token"],
                    "last_annotation_token": chain[-1]["token"],
                }
            )
        return annotations, instances


def link(rows: list[Row]) -> None:
    """Fills prev and next of rows in order."""
    for before, after in pairwise(rows):
        before["next"], after["prev"] = after["token"], before["token"]


def points_in_boxes(
    points_p5: npt.NDArray[np.float32],
    centers_n3: Array,
    sizes_n3: Array,
    yaws_n: Array,
    origin_3: Array,
    to_world_33: Array,
) -> IntArray:
    """Points inside each upright box (faces included), as the stored float32 cloud has them, (N,).

    Args:
        points_p5: Cloud in the frame of the sensor.
        centers_n3: Centres of the boxes in the world.
        sizes_n3: Lengths, widths, heights.
        yaws_n: Headings.
        origin_3: Position of the sensor in the world.
        to_world_33: Rotation from the sensor frame to the world.
    """
    xyz = points_p5[np.argsort(points_p5[:, 0], kind="stable"), :3].astype(np.float64)
    counts = np.zeros(len(centers_n3), dtype=np.int64)
    for n, (center, size, yaw) in enumerate(zip(centers_n3, sizes_n3, yaws_n, strict=True)):
        box_to_sensor = to_world_33.T @ quaternion_to_matrix(yaw_pitch_roll_quaternion(float(yaw)))
        middle = rotate(center - origin_3, to_world_33.T)
        reach = float(np.linalg.norm(size))
        first, last = np.searchsorted(xyz[:, 0], (middle[0] - reach, middle[0] + reach))
        local = rotate(xyz[first:last] - middle, box_to_sensor.T)
        counts[n] = (np.abs(local) <= size / 2).all(axis=1).sum()
    return counts
