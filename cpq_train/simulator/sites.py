"""Sites: lanes, kerbs, sidewalks, crossings and lots, each of which proposes a way through the scene.

Letters: T sweep times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpq_train.simulator.actors import draw_travel
from cpq_train.simulator.geometry import Array, turned
from cpq_train.simulator.road import SIDEWALK_WIDTH_M, Lane, Road
from cpq_train.simulator.shapes import Size

FAR_REACH_M = 54.0
REACH_M = {
    "barrier": 33.0,
    "traffic_cone": 33.0,
    "motorcycle": 44.0,
    "bicycle": 44.0,
    "pedestrian": 44.0,
    "rack": 40.0,
}
"""How far from the ego vehicle a kind is placed; somewhat beyond the range at which its class is scored."""


def reach(kind: str) -> float:
    """How far from the ego vehicle objects of a kind are placed, metres."""
    return REACH_M.get(kind, FAR_REACH_M)


@dataclass(frozen=True)
class Stage:
    """The empty scene that objects enter.

    Attributes:
        roads: Main road first.
        times_s: (T,) sweep times from 0.
        ego_poses_t3: (T, 3) of the ego vehicle.
        ego_travel_t: (T,) metres it has driven along the main road.
    """

    roads: list[Road]
    times_s: Array
    ego_poses_t3: Array
    ego_travel_t: Array


class Sites:
    """Draws proposals.

    Lane: driving, or waiting, in a lane of any road. Kerb: parked along the main road. Edge: riding at the
    side of the main road. Sidewalk: walking or standing beside a road. Crossing: walking across the main one.
    Lot: anywhere, at any heading; whether it is off the roads is for the caller to check. Border: between the
    main road and its sidewalk, facing it.
    """

    def __init__(self, stage: Stage, rng: np.random.Generator) -> None:
        self.stage, self.rng = stage, rng
        self._main = stage.roads[0]
        self._lane_travel: dict[Lane, Array] = {}
        self._makers: dict[str, Callable[[str, Size], tuple[Array, str]]] = {
            "lane": self._lane,
            "kerb": self._kerb,
            "edge": self._edge,
            "sidewalk": self._sidewalk,
            "crossing": self._crossing,
            "lot": self._lot,
            "border": self._border,
        }

    def propose(self, site: str, kind: str, size: Size) -> tuple[Array, str]:
        """Poses (T, 3) and the state at rest of an object of a kind and size."""
        return self._makers[site](kind, size)

    def still(self, pose: Array) -> Array:
        """A pose (3,) held at all times, (T, 3)."""
        return np.repeat(pose[None], len(self.stage.times_s), axis=0)

    def _start(self, kind: str, road: Road, travel: Array, direction: int) -> float:
        """A start that brings the object, at some time, near the ego vehicle (or a cross road's middle)."""
        t = int(self.rng.integers(len(self.stage.times_s)))
        near = self.stage.ego_travel_t[t] if road is self._main else 0.0
        return float(near + self.rng.uniform(-1, 1) * reach(kind) - direction * travel[t])

    def _spot(self, kind: str) -> float:
        """A place along the main road for something that does not move along it."""
        return self._start(kind, self._main, self._no_travel(), 1)

    def _no_travel(self) -> Array:
        return np.zeros(len(self.stage.times_s))

    def _draw_road(self) -> Road:
        roads = self.stage.roads
        return roads[1] if len(roads) > 1 and self.rng.random() < 0.25 else roads[0]

    def _draw_side(self) -> int:
        """Side of a road, as a sign in d; traffic there drives in the direction of the other sign."""
        return int(self.rng.choice([-1, 1]))

    def _travel(self, lane: Lane, is_ego_lane: bool) -> Array:
        """All traffic of a lane keeps one pace, so that nobody runs into another."""
        if is_ego_lane:
            return self.stage.ego_travel_t
        if lane not in self._lane_travel:
            pace = 0.0 if self.rng.random() < 0.25 else self.rng.uniform(2.5, 11.0)
            self._lane_travel[lane] = draw_travel(self.rng, self.stage.times_s, pace)
        return self._lane_travel[lane]

    def _lane(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self._draw_road()
        lane = road.lanes[int(self.rng.integers(len(road.lanes)))]
        travel = self._travel(lane, road is self._main and lane.d == 0.0)
        s = self._start(kind, road, travel, lane.direction) + lane.direction * travel
        return road.pose(s, lane.d + self.rng.normal(0, 0.2), lane.direction), "stopped"

    def _kerb(self, kind: str, size: Size) -> tuple[Array, str]:
        side = self._draw_side()
        d = side * (self._main.kerb_m(side) - size[1] / 2 - self.rng.uniform(0.05, 0.25))
        pose = self._main.pose(np.array(self._spot(kind)), d, -side)
        return self.still(turned(pose, self.rng.normal(0, 0.03))), "parked"

    def _edge(self, kind: str, size: Size) -> tuple[Array, str]:
        side = self._draw_side()
        travel = draw_travel(self.rng, self.stage.times_s, self.rng.uniform(2.0, 6.5))
        d = side * (self._main.kerb_m(side) - self.rng.uniform(0.5, 1.0))
        s = self._start(kind, self._main, travel, -side) - side * travel
        return self._main.pose(s, d, -side), "stopped"

    def _walk(self) -> tuple[Array, str]:
        """Metres walked (T,) and the state at rest."""
        if self.rng.random() < 0.3:
            state = "standing" if self.rng.random() < 0.9 else "sitting_lying_down"
            return self._no_travel(), state
        return draw_travel(self.rng, self.stage.times_s, self.rng.uniform(0.7, 1.8)), "standing"

    def _sidewalk(self, kind: str, size: Size) -> tuple[Array, str]:
        road, side, direction = self._draw_road(), self._draw_side(), self._draw_side()
        d = side * (road.kerb_m(side) + self.rng.uniform(0.6, SIDEWALK_WIDTH_M))
        travel, state = self._walk() if kind == "pedestrian" else (self._no_travel(), "parked")
        s = self._start(kind, road, travel, direction) + direction * travel
        poses = road.pose(s, d, direction)
        return (poses if travel[-1] else turned(poses, self.rng.uniform(-np.pi, np.pi))), state

    def _crossing(self, kind: str, size: Size) -> tuple[Array, str]:
        travel, state = self._walk()
        side = self._draw_side()
        middle = self.rng.uniform(-self._main.right_m, self._main.left_m)
        d = middle + side * (travel - travel[-1] / 2)
        line = self._main.pose(np.full(len(d), self._spot(kind)), d)
        return turned(line, side * np.pi / 2), state

    def _lot(self, kind: str, size: Size) -> tuple[Array, str]:
        ego = self.stage.ego_poses_t3[int(self.rng.integers(len(self.stage.times_s)))]
        angle, range_m = self.rng.uniform(-np.pi, np.pi), self.rng.uniform(6.0, reach(kind) - 1)
        xy = ego[:2] + range_m * np.array([np.cos(angle), np.sin(angle)])
        turn = self.rng.choice([0, 0.5, 1.0, 1.5]) * np.pi + self.rng.normal(0, 0.08)
        yaw = ego[2] + turn if self.rng.random() < 0.6 else self.rng.uniform(-np.pi, np.pi)
        travel, state = self._no_travel(), "parked"
        if kind == "pedestrian":
            travel, state = self._walk()
        elif kind == "construction_vehicle" and self.rng.random() < 0.3:
            travel = draw_travel(self.rng, self.stage.times_s, self.rng.uniform(0.5, 2.5))
        poses = self.still(np.array([*xy, yaw]))
        poses[:, :2] += travel[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
        return poses, state

    def _border(self, kind: str, size: Size) -> tuple[Array, str]:
        side = self._draw_side()
        d = side * (self._main.kerb_m(side) + self.rng.uniform(-0.6, 0.6))
        pose = self._main.pose(np.array(self._spot(kind)), d)
        return self.still(turned(pose, -np.pi / 2)), "parked"
