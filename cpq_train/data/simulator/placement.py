"""Where the objects of a scene stand and go: lanes, kerbs, sidewalks, crossings, lots, rows.

A site proposes a way through the scene; it is taken when the object stays clear of everything placed before, is within
the annotated range and, nearly always, can be seen from the ego vehicle.
Letters: T sweep times, K coarse times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpq_train.data.simulator.actors import COARSE, Actor, Occupancy, draw_travel, footprint
from cpq_train.data.simulator.geometry import Array
from cpq_train.data.simulator.road import SIDEWALK_WIDTH_M, Lane, Road
from cpq_train.data.simulator.shapes import Model, Size, draw_model

NUM_TRIES = 40
HIDDEN_SHARE = 0.1
BESIDE_M = 9.0
"""A large vehicle this close to the ego vehicle takes half the view; four of five such places are refused."""
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

COUNTS: dict[str, tuple[int, int]] = {
    "bus": (2, 4),
    "rig": (1, 2),
    "trailer": (1, 2),
    "truck": (2, 4),
    "construction_vehicle": (2, 4),
    "car": (9, 17),
    "rack": (0, 1),
    "barrier": (1, 3),
    "traffic_cone": (2, 4),
    "motorcycle": (3, 5),
    "bicycle": (3, 5),
    "pedestrian": (7, 13),
    "other": (1, 3),
}
"""How many to place within reach of one ego position, least and most, largest kinds first.

A rig is a tractor with its trailer, a rack one with its bicycles; barriers and cones count rows of several."""

SITES: dict[str, dict[str, float]] = {
    "car": {"lane": 0.5, "kerb": 0.25, "lot": 0.25},
    "truck": {"lane": 0.45, "kerb": 0.2, "lot": 0.35},
    "bus": {"lane": 0.5, "kerb": 0.2, "lot": 0.3},
    "rig": {"lane": 0.6, "lot": 0.4},
    "trailer": {"kerb": 0.25, "lot": 0.75},
    "construction_vehicle": {"lane": 0.1, "kerb": 0.2, "lot": 0.7},
    "motorcycle": {"lane": 0.4, "kerb": 0.1, "sidewalk": 0.25, "lot": 0.25},
    "bicycle": {"edge": 0.4, "sidewalk": 0.35, "lot": 0.25},
    "pedestrian": {"sidewalk": 0.5, "crossing": 0.15, "lot": 0.35},
    "rack": {"border": 0.6, "lot": 0.4},
    "other": {"sidewalk": 0.6, "lot": 0.4},
    "barrier": {"border": 0.5, "lot": 0.5},
    "traffic_cone": {"border": 0.5, "lot": 0.5},
}
VIEW_BLOCKERS = {"bus", "rig", "trailer", "truck", "construction_vehicle"}
ROWS: dict[str, tuple[int, int, float, float]] = {
    "barrier": (2, 5, 0.08, 0.6),
    "traffic_cone": (2, 5, 1.2, 3.5),
}
"""Least and most in a row, and the gap between two of them in metres."""


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


def _reach(kind: str) -> float:
    return REACH_M.get(kind, FAR_REACH_M)


class Placer:
    """Fills a stage with actors."""

    def __init__(self, stage: Stage, occupancy: Occupancy, rng: np.random.Generator) -> None:
        self.stage, self.occupancy, self.rng = stage, occupancy, rng
        self.actors: list[Actor] = []
        self._lane_travel: dict[Lane, Array] = {}
        self._sites: dict[str, Callable[[str, Size], tuple[Array, str]]] = {
            "lane": self._lane,
            "kerb": self._kerb,
            "edge": self._edge,
            "sidewalk": self._sidewalk,
            "crossing": self._crossing,
            "lot": self._lot,
            "border": self._border,
        }

    def fill(self) -> None:
        """Places all kinds, largest first, in numbers that grow with the length of the ego vehicle's way."""
        for kind, (least, most) in COUNTS.items():
            crowd = 1.0 + float(self.stage.ego_travel_t[-1]) / (2 * _reach(kind))
            for _ in range(round(float(self.rng.integers(least, most + 1)) * crowd)):
                self._place(kind)

    def _place(self, kind: str) -> None:
        model, ridden = self._model(kind)
        size = model.draw_size(self.rng)
        site = self._draw_site(kind, ridden)
        for attempt in range(NUM_TRIES):
            if attempt == NUM_TRIES // 2 and not ridden:
                site = "lot"
            poses, state = self._sites[site](kind, size)
            if self._is_good(kind, poses, size, site):
                self._enter(kind, model, size, poses, state, ridden)
                return

    def _draw_site(self, kind: str, ridden: bool) -> str:
        sites = dict(SITES[kind])
        if kind in ("motorcycle", "bicycle"):
            sites = {s: w for s, w in sites.items() if (s in ("lane", "edge")) == ridden}
        weights = np.array(list(sites.values()))
        return str(self.rng.choice(list(sites), p=weights / weights.sum()))

    def _model(self, kind: str) -> tuple[Model, bool]:
        """The model and whether somebody rides on it."""
        if kind in ("motorcycle", "bicycle") and self.rng.random() < 0.5:
            return draw_model(f"{kind}_ridden", self.rng), True
        return draw_model("tractor" if kind == "rig" else kind, self.rng), False

    def _is_good(self, kind: str, poses: Array, size: Size, site: str) -> bool:
        """In reach at some time, off the roads when in a lot, free of collisions, and (mostly) in view."""
        middle = int(self.rng.integers(len(poses) // COARSE)) * COARSE
        eye, spot = self.stage.ego_poses_t3[middle, :2], poses[middle, :2]
        away = np.hypot(*(spot - eye))
        if away > _reach(kind) or (kind in VIEW_BLOCKERS and away < BESIDE_M and self.rng.random() < 0.8):
            return False
        if site == "lot" and not self._is_off_road(spot, 0.5 * max(size[:2])):
            return False
        if not self.occupancy.is_free(poses[::COARSE], footprint(size), 0.25):
            return False
        hidden = self.occupancy.is_hidden(eye, spot, middle // COARSE)
        return not hidden or self.rng.random() < HIDDEN_SHARE / NUM_TRIES

    def _is_off_road(self, xy: Array, margin_m: float) -> bool:
        point = xy[None]
        return all(
            float(r.distance(point)[0]) > r.corridor_m - SIDEWALK_WIDTH_M + margin_m for r in self.stage.roads
        )

    def _enter(self, kind: str, model: Model, size: Size, poses: Array, state: str, ridden: bool) -> None:
        """Takes an object in, with what comes along: a trailer behind its tractor, the rest of a row."""
        if kind in ("motorcycle", "bicycle"):
            state = "with_rider" if ridden else "without_rider"
        self._add(model, size, poses, state, kind in VIEW_BLOCKERS)
        if kind == "rig":
            self._add_trailer(poses, size, state)
        elif kind == "rack":
            self._fill_rack(poses[0], size)
        elif kind in ROWS:
            self._add_row(kind, model, size, poses)

    def _add(self, model: Model, size: Size, poses: Array, state: str, tall: bool) -> None:
        self.actors.append(Actor(model.category, size, poses, state, model.build(size, self.rng)))
        self.occupancy.add(poses[::COARSE], footprint(size), tall)

    def _add_trailer(self, tractor: Array, tractor_size: Size, state: str) -> None:
        model = draw_model("trailer", self.rng)
        size = model.draw_size(self.rng)
        back = (tractor_size[0] + size[0]) / 2 + 0.3
        heading = np.stack([np.cos(tractor[:, 2]), np.sin(tractor[:, 2])], axis=1)
        poses = np.concatenate([tractor[:, :2] - back * heading, tractor[:, 2:]], axis=1)
        if self.occupancy.is_free(poses[::COARSE], footprint(size), 0.05):
            self._add(model, size, poses, state, True)

    def _add_row(self, kind: str, model: Model, size: Size, first: Array) -> None:
        least, most, gap_min, gap_max = ROWS[kind]
        pose, gap = first[0].copy(), self.rng.uniform(gap_min, gap_max)
        for _ in range(int(self.rng.integers(least, most + 1)) - 1):
            # The row runs along the width of its members, as barriers are annotated.
            step = size[1] + gap
            pose = pose + [-step * np.sin(pose[2]), step * np.cos(pose[2]), self.rng.normal(0, 0.04)]
            member = model.draw_size(self.rng) if kind == "traffic_cone" else size
            poses = self._still(pose)
            if not self.occupancy.is_free(poses[::COARSE], footprint(member), 0.03):
                return
            self._add(model, member, poses, "", False)

    def _fill_rack(self, rack: Array, rack_size: Size) -> None:
        """Bicycles side by side along the rack's length."""
        across = rack + [0, 0, np.pi / 2 * self.rng.choice([-1, 1])]
        for offset in np.arange(-rack_size[0] / 2 + 0.45, rack_size[0] / 2 - 0.4, 0.75):
            model = draw_model("bicycle", self.rng)
            size = model.draw_size(self.rng)
            if self.rng.random() < 0.7 and size[0] < rack_size[1]:
                pose = across + [offset * np.cos(rack[2]), offset * np.sin(rack[2]), self.rng.normal(0, 0.04)]
                self._add(model, size, self._still(pose), "without_rider", False)

    # Sites: each proposes poses (T, 3) and the state at rest.

    def _still(self, pose: Array) -> Array:
        return np.repeat(pose[None], len(self.stage.times_s), axis=0)

    def _s_near_ego(self, kind: str, travel: Array, direction: int) -> float:
        """A start on the main road from which the object is within reach of the ego vehicle at a random time."""
        t = int(self.rng.integers(len(self.stage.times_s)))
        return float(
            self.stage.ego_travel_t[t] + self.rng.uniform(-1, 1) * _reach(kind) - direction * travel[t]
        )

    def _draw_road(self) -> Road:
        roads = self.stage.roads
        return roads[1] if len(roads) > 1 and self.rng.random() < 0.25 else roads[0]

    def _travel(self, lane: Lane, own_lane: bool) -> Array:
        """All traffic of a lane keeps one pace, so that nobody runs into another."""
        if own_lane:
            return self.stage.ego_travel_t
        if lane not in self._lane_travel:
            pace = 0.0 if self.rng.random() < 0.25 else self.rng.uniform(2.5, 11.0)
            self._lane_travel[lane] = draw_travel(self.rng, self.stage.times_s, pace)
        return self._lane_travel[lane]

    def _lane(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self._draw_road()
        lane = road.lanes[int(self.rng.integers(len(road.lanes)))]
        main = road is self.stage.roads[0]
        travel = self._travel(lane, main and lane.d == 0.0)
        start = (
            self._s_near_ego(kind, travel, lane.direction)
            if main
            else self.rng.uniform(-FAR_REACH_M, FAR_REACH_M)
        )
        d = lane.d + self.rng.normal(0, 0.2)
        return road.pose(start + lane.direction * travel, d, lane.direction), "stopped"

    def _side(self, road: Road) -> tuple[float, int]:
        """A side of the road: its sign in d and the direction of the traffic there."""
        side = int(self.rng.choice([-1, 1]))
        return float(side), -side

    def _kerb(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self.stage.roads[0]
        side, direction = self._side(road)
        width = road.left_m if side > 0 else road.right_m
        d = side * (width - size[1] / 2 - self.rng.uniform(0.05, 0.25))
        s = self._s_near_ego(kind, 0 * self.stage.times_s, 1)
        pose = road.pose(np.array(s), d, direction)
        return self._still(pose + [0, 0, self.rng.normal(0, 0.03)]), "parked"

    def _edge(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self.stage.roads[0]
        side, direction = self._side(road)
        travel = draw_travel(self.rng, self.stage.times_s, self.rng.uniform(2.0, 6.5))
        d = side * ((road.left_m if side > 0 else road.right_m) - self.rng.uniform(0.5, 1.0))
        return road.pose(self._s_near_ego(kind, travel, direction) + direction * travel, d, direction), ""

    def _walk(self) -> tuple[Array, str]:
        """Metres walked (T,) and the state at rest."""
        if self.rng.random() < 0.3:
            return 0 * self.stage.times_s, str(
                self.rng.choice(["standing", "sitting_lying_down"], p=[0.9, 0.1])
            )
        return draw_travel(self.rng, self.stage.times_s, self.rng.uniform(0.7, 1.8)), "standing"

    def _sidewalk(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self._draw_road()
        side, direction = self._side(road)
        direction *= int(self.rng.choice([-1, 1]))
        d = side * ((road.left_m if side > 0 else road.right_m) + self.rng.uniform(0.6, SIDEWALK_WIDTH_M))
        walks = kind == "pedestrian"
        travel, state = self._walk() if walks else (0 * self.stage.times_s, "")
        main = road is self.stage.roads[0]
        start = (
            self._s_near_ego(kind, travel, direction) if main else self.rng.uniform(-FAR_REACH_M, FAR_REACH_M)
        )
        poses = road.pose(start + direction * travel, d, direction)
        if not walks or travel[-1] == 0:
            poses = poses + [0, 0, self.rng.uniform(-np.pi, np.pi)]
        return poses, state

    def _crossing(self, kind: str, size: Size) -> tuple[Array, str]:
        road = self.stage.roads[0]
        travel, state = self._walk()
        side = int(self.rng.choice([-1, 1]))
        d = self.rng.uniform(-road.right_m, road.left_m) - side * travel[-1] / 2 + side * travel
        s = self._s_near_ego(kind, 0 * travel, 1)
        return road.pose(np.full(len(d), s), d) + [0, 0, side * np.pi / 2], state

    def _lot(self, kind: str, size: Size) -> tuple[Array, str]:
        ego = self.stage.ego_poses_t3[int(self.rng.integers(len(self.stage.times_s)))]
        angle, range_m = self.rng.uniform(-np.pi, np.pi), self.rng.uniform(6.0, _reach(kind) - 1)
        xy = ego[:2] + range_m * np.array([np.cos(angle), np.sin(angle)])
        turn = self.rng.choice([0, 0.5, 1.0, 1.5]) * np.pi + self.rng.normal(0, 0.08)
        yaw = ego[2] + turn if self.rng.random() < 0.6 else self.rng.uniform(-np.pi, np.pi)
        poses = self._still(np.array([*xy, yaw]))
        if kind == "pedestrian":
            travel, state = self._walk()
            poses[:, :2] += travel[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
            return poses, state
        if kind == "construction_vehicle" and self.rng.random() < 0.3:
            travel = draw_travel(self.rng, self.stage.times_s, self.rng.uniform(0.5, 2.5))
            poses[:, :2] += travel[:, None] * np.array([np.cos(yaw), np.sin(yaw)])
        return poses, "" if kind in (*ROWS, "other", "rack") else "parked"

    def _border(self, kind: str, size: Size) -> tuple[Array, str]:
        """On the line between the road and its sidewalk, or off a lane's edge; the row runs along the road."""
        road = self.stage.roads[0]
        side, _ = self._side(road)
        d = side * ((road.left_m if side > 0 else road.right_m) + self.rng.uniform(-0.6, 0.6))
        pose = road.pose(np.array(self._s_near_ego(kind, 0 * self.stage.times_s, 1)), d)
        return self._still(pose - [0, 0, np.pi / 2]), ""
