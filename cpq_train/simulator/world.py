"""A scene put together: roads, the ego vehicle's way, actors, surroundings, ground.

Letters: T sweep times, N actors, M parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.actors import COARSE, Actor, Occupancy, draw_travel
from cpq_train.simulator.geometry import Array, quaternion_to_matrix, yaw_pitch_roll_quaternion
from cpq_train.simulator.ground import Ground, draw_ground
from cpq_train.simulator.parts import Parts, collect, concatenate
from cpq_train.simulator.placement import Placer
from cpq_train.simulator.road import draw_roads
from cpq_train.simulator.sensor import MAX_RANGE_M, draw_mounting
from cpq_train.simulator.sites import Stage
from cpq_train.simulator.surroundings import Thing, draw_buildings, draw_small_things

EGO_HALF_M = np.array([2.1, 0.95])
EGO_CENTER_AHEAD_M = 1.35
"""The middle of the ego vehicle lies this far before its rear axle."""


@dataclass(frozen=True)
class World:
    """A scene over time.

    Attributes:
        ground: Its height field.
        actors: N annotated objects.
        actor_z_nt: (N, T) height of the ground below each actor.
        actor_parts: Bodies of all actors, each in its actor's frame, `owner` being the actor.
        still_parts: Surroundings, in the world.
        ego_translation_t3: (T, 3).
        ego_rotation_t4: (T, 4) quaternions (w, x, y, z).
        mount_translation_3: Sensor in the ego frame.
        mount_rotation_4: Sensor to ego frame.
    """

    ground: Ground
    actors: list[Actor]
    actor_z_nt: Array
    actor_parts: Parts
    still_parts: Parts
    ego_translation_t3: Array
    ego_rotation_t4: Array
    mount_translation_3: Array
    mount_rotation_4: Array

    def sensor_pose(self, t: int) -> tuple[Array, Array]:
        """Position (3,) and rotation to the world (3, 3) of the sensor."""
        ego = quaternion_to_matrix(self.ego_rotation_t4[t])
        origin = self.ego_translation_t3[t] + ego @ self.mount_translation_3
        return origin, ego @ quaternion_to_matrix(self.mount_rotation_4)

    def box_center(self, actor: int, t: int) -> Array:
        """Centre of an actor's box, (3,)."""
        x, y, _ = self.actors[actor].poses_t3[t]
        return np.array([x, y, self.actor_z_nt[actor, t] + self.actors[actor].size_m[2] / 2])

    def parts_at(self, t: int) -> Parts:
        """All parts within the sensor's range at sweep t."""
        owner = self.actor_parts.owner
        poses = np.array([actor.poses_t3[t] for actor in self.actors])[owner]
        z = np.array([self.actor_z_nt[n, t] + actor.size_m[2] / 2 for n, actor in enumerate(self.actors)])[
            owner
        ]
        moving = self.actor_parts.moved(poses[:, 0], poses[:, 1], z, poses[:, 2])
        parts = concatenate([moving, self.still_parts])
        away = np.hypot(*(parts.center[:, :2] - self.ego_translation_t3[t, :2]).T)
        return parts.take(np.flatnonzero(away - np.hypot(parts.half[:, 0], parts.half[:, 1]) < MAX_RANGE_M))


def draw_world(rng: np.random.Generator, times_s: Array) -> World:
    """A scene for the given sweep times (T,), which start at 0."""
    pace = 0.0 if rng.random() < 0.12 else rng.uniform(2.0, 11.0)
    travel = draw_travel(rng, times_s, pace)
    length_m = float(travel[-1])
    roads = draw_roads(rng, length_m)
    ego_t3 = roads[0].pose(travel, 0.15 * np.sin(times_s / 3 + rng.uniform(0, 6)))
    buildings = draw_buildings(rng, roads, length_m)
    occupancy = _occupancy(ego_t3, buildings)
    placer = Placer(Stage(roads, times_s, ego_t3, travel), occupancy, rng)
    placer.fill()
    things = buildings + draw_small_things(rng, roads, occupancy, ego_t3, length_m)
    ground = draw_ground(rng)
    translation, rotation = _ego_poses(rng, ego_t3, ground, times_s)
    mount_translation, mount_rotation = draw_mounting(rng)
    actors = placer.actors
    z_nt = np.array([ground.height(a.poses_t3[:, 0], a.poses_t3[:, 1]) for a in actors])
    owners = [n for n, actor in enumerate(actors) for _ in actor.parts]
    bodies = collect([part for actor in actors for part in actor.parts], owners)
    return World(ground, actors, z_nt, bodies, _still_parts(things, ground), translation, rotation,
                 mount_translation, mount_rotation)  # fmt: skip


def _occupancy(ego_t3: Array, buildings: list[Thing]) -> Occupancy:
    """Ego vehicle and buildings."""
    coarse = ego_t3[::COARSE]
    heading = np.stack([np.cos(coarse[:, 2]), np.sin(coarse[:, 2])], axis=1)
    ego = np.concatenate([coarse[:, :2] + EGO_CENTER_AHEAD_M * heading, coarse[:, 2:]], axis=1)
    occupancy = Occupancy(np.zeros((0, len(coarse), 3)))
    occupancy.add(ego, EGO_HALF_M + 0.4, False)
    for building in buildings:
        occupancy.add(np.repeat(building.pose[None], len(coarse), axis=0), building.half, True)
    return occupancy


def _ego_poses(
    rng: np.random.Generator, ego_t3: Array, ground: Ground, times_s: Array
) -> tuple[Array, Array]:
    """Positions on the ground and attitudes that follow its slope, with a slight sway."""
    x, y, yaw = ego_t3.T
    z, gx, gy = ground.height_and_gradient(x, y)
    sway = 0.003 * np.sin(times_s[:, None] * rng.uniform(1, 4, 2) + rng.uniform(0, 6, 2))
    pitch = -(gx * np.cos(yaw) + gy * np.sin(yaw)) + sway[:, 0]
    roll = gy * np.cos(yaw) - gx * np.sin(yaw) + sway[:, 1]
    rotation = [yaw_pitch_roll_quaternion(*map(float, v)) for v in zip(yaw, pitch, roll, strict=True)]
    return np.stack([x, y, z], axis=1), np.array(rotation)


def _still_parts(things: list[Thing], ground: Ground) -> Parts:
    flat = [(thing.pose, part) for thing in things for part in thing.parts]
    parts = collect([part for _, part in flat], [-1] * len(flat))
    poses = np.array([pose for pose, _ in flat])
    return parts.moved(poses[:, 0], poses[:, 1], ground.height(poses[:, 0], poses[:, 1]), poses[:, 2])
