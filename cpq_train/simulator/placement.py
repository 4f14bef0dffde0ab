"""Where the objects of a scene stand and go: lanes, kerbs, sidewalks, crossings, lots, rows.

A site proposes a way through the scene; it is taken when the object stays clear of everything placed before,
is near enough and, nearly always, can be seen from the ego vehicle.
Letters: T sweep times, K coarse times.
"""

import numpy as np

from cpq_train.simulator.actors import COARSE, Actor, Occupancy, footprint
from cpq_train.simulator.catalogue import Model, draw_model
from cpq_train.simulator.geometry import Array, turned
from cpq_train.simulator.road import SIDEWALK_WIDTH_M
from cpq_train.simulator.shapes import Size
from cpq_train.simulator.sites import Sites, Stage, reach

NUM_TRIES = 40
NUM_MORE_TRIES = 8
"""So often more is a kind tried of which nothing found a place, so that no class is missing from a scene."""
HIDDEN_SHARE = 0.1
BESIDE_M = 9.0
"""A large vehicle this close to the ego vehicle takes half the view; four of five such places are refused."""

COUNTS: dict[str, tuple[int, int]] = {
    "bus": (2, 4),
    "rig": (1, 2),
    "trailer": (1, 2),
    "truck": (2, 4),
    "construction_vehicle": (2, 4),
    "car": (9, 17),
    "rack": (0, 1),
    "barrier": (2, 3),
    "traffic_cone": (2, 4),
    "motorcycle": (3, 5),
    "bicycle": (3, 5),
    "pedestrian": (7, 13),
    "other": (1, 3),
}
"""How many to place within reach of one ego position, least and most, largest kinds first.

A rig is a tractor with its trailer, a rack has its bicycles; barriers and cones count rows of several."""

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


class Placer:
    """Fills a stage with actors."""

    def __init__(self, stage: Stage, occupancy: Occupancy, rng: np.random.Generator) -> None:
        self.stage, self.occupancy, self.rng = stage, occupancy, rng
        self.actors: list[Actor] = []
        self.sites = Sites(stage, rng)

    def fill(self) -> None:
        """Places all kinds, largest first, in numbers that grow with the length of the ego vehicle's way."""
        for kind, (least, most) in COUNTS.items():
            crowd = 1.0 + float(self.stage.ego_travel_t[-1]) / (2 * reach(kind))
            wanted = round(float(self.rng.integers(least, most + 1)) * crowd)
            placed = sum(self._place(kind) for _ in range(wanted))
            for _ in range(NUM_MORE_TRIES if wanted and not placed else 0):
                if self._place(kind):
                    break

    def _place(self, kind: str) -> bool:
        model, ridden = self._model(kind)
        size = model.draw_size(self.rng)
        site = self._draw_site(kind, ridden)
        for attempt in range(NUM_TRIES):
            if attempt == NUM_TRIES // 2 and not ridden:
                site = "lot"
            poses, state = self.sites.propose(site, kind, size)
            if self._is_good(kind, poses, size, site):
                self._enter(kind, model, size, poses, state, ridden)
                return True
        return False

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
        if away > reach(kind) or (kind in VIEW_BLOCKERS and away < BESIDE_M and self.rng.random() < 0.8):
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
            shift = step * np.array([-np.sin(pose[2]), np.cos(pose[2]), 0.0])
            pose = turned(pose + shift, self.rng.normal(0, 0.04))
            member = model.draw_size(self.rng) if kind == "traffic_cone" else size
            poses = self.sites.still(pose)
            if not self.occupancy.is_free(poses[::COARSE], footprint(member), 0.03):
                return
            self._add(model, member, poses, "", False)

    def _fill_rack(self, rack: Array, rack_size: Size) -> None:
        """Bicycles side by side along the rack's length."""
        across = turned(rack, np.pi / 2 * self.rng.choice([-1, 1]))
        for offset in np.arange(-rack_size[0] / 2 + 0.45, rack_size[0] / 2 - 0.4, 0.75):
            model = draw_model("bicycle", self.rng)
            size = model.draw_size(self.rng)
            if self.rng.random() < 0.7 and size[0] < rack_size[1]:
                shift = offset * np.array([np.cos(rack[2]), np.sin(rack[2]), 0.0])
                pose = turned(across + shift, self.rng.normal(0, 0.04))
                self._add(model, size, self.sites.still(pose), "without_rider", False)
