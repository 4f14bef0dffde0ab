"""The kinds of objects: nuScenes categories, their sizes and their bodies.

Sizes are (length, width, height) in metres.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from cpq_train.simulator.parts import Part
from cpq_train.simulator.shapes import (
    Size,
    barrier,
    bicycle,
    box_trailer,
    box_truck,
    bus,
    car,
    cart,
    cone,
    excavator,
    flat_trailer,
    loader,
    motorcycle,
    pedestrian,
    pickup,
    rack,
    tractor,
)


@dataclass(frozen=True)
class Model:
    """A kind of object.

    Attributes:
        category: nuScenes category.
        size_m: Mean length, width, height.
        spread: Relative standard deviations of the three.
        weight: Share among the kinds of its class.
        build: Makes the parts from a size and a generator.
    """

    category: str
    size_m: Size
    spread: Size
    weight: float
    build: Callable[[Size, np.random.Generator], list[Part]]

    def draw_size(self, rng: np.random.Generator) -> Size:
        """A size, rounded to millimetres as in nuScenes' tables."""
        common = rng.normal(0, 0.6)
        factor = np.exp(np.array(self.spread) * np.clip(common + rng.normal(0, 0.8, 3), -2, 2))
        length, width, height = (round(float(v), 3) for v in np.array(self.size_m) * factor)
        return length, width, height


MODELS: dict[str, tuple[Model, ...]] = {
    "car": (Model("vehicle.car", (4.63, 1.95, 1.73), (0.09, 0.06, 0.1), 1.0, car),),
    "truck": (
        Model("vehicle.truck", (7.6, 2.55, 3.1), (0.16, 0.06, 0.12), 0.7, box_truck),
        Model("vehicle.truck", (5.7, 2.1, 1.95), (0.06, 0.05, 0.05), 0.3, pickup),
    ),
    "tractor": (Model("vehicle.truck", (6.4, 2.6, 3.3), (0.1, 0.05, 0.1), 1.0, tractor),),
    "construction_vehicle": (
        Model("vehicle.construction", (6.6, 2.85, 3.2), (0.18, 0.1, 0.14), 0.55, excavator),
        Model("vehicle.construction", (6.0, 2.7, 3.1), (0.18, 0.1, 0.12), 0.45, loader),
    ),
    "bus": (
        Model("vehicle.bus.rigid", (10.8, 2.93, 3.45), (0.12, 0.03, 0.06), 0.85, bus),
        Model("vehicle.bus.bendy", (10.0, 2.95, 3.4), (0.08, 0.03, 0.05), 0.15, bus),
    ),
    "trailer": (
        Model("vehicle.trailer", (12.2, 2.9, 3.95), (0.15, 0.05, 0.08), 0.7, box_trailer),
        Model("vehicle.trailer", (11.0, 2.8, 3.0), (0.2, 0.06, 0.15), 0.3, flat_trailer),
    ),
    "barrier": (Model("movable_object.barrier", (0.5, 2.5, 1.0), (0.2, 0.15, 0.1), 1.0, barrier),),
    "motorcycle_ridden": (
        Model(
            "vehicle.motorcycle", (2.15, 0.8, 1.62), (0.08, 0.12, 0.06), 1.0, partial(motorcycle, ridden=True)
        ),
    ),
    "motorcycle": (Model("vehicle.motorcycle", (2.1, 0.77, 1.24), (0.08, 0.12, 0.05), 1.0, motorcycle),),
    "bicycle_ridden": (
        Model("vehicle.bicycle", (1.75, 0.62, 1.62), (0.07, 0.12, 0.07), 1.0, partial(bicycle, ridden=True)),
    ),
    "bicycle": (Model("vehicle.bicycle", (1.7, 0.6, 1.07), (0.07, 0.12, 0.06), 1.0, bicycle),),
    "pedestrian": (
        Model("human.pedestrian.adult", (0.73, 0.67, 1.77), (0.15, 0.13, 0.07), 0.82, pedestrian),
        Model(
            "human.pedestrian.construction_worker", (0.75, 0.72, 1.76), (0.15, 0.13, 0.05), 0.1, pedestrian
        ),
        Model("human.pedestrian.child", (0.55, 0.5, 1.35), (0.12, 0.12, 0.1), 0.06, pedestrian),
        Model("human.pedestrian.police_officer", (0.73, 0.7, 1.8), (0.12, 0.12, 0.05), 0.02, pedestrian),
    ),
    "traffic_cone": (Model("movable_object.trafficcone", (0.42, 0.42, 1.02), (0.14, 0.14, 0.18), 1.0, cone),),
    "rack": (Model("static_object.bicycle_rack", (4.5, 2.2, 1.2), (0.3, 0.04, 0.05), 1.0, rack),),
    "other": (
        Model("movable_object.pushable_pullable", (0.7, 0.65, 1.05), (0.2, 0.2, 0.15), 0.6, cart),
        Model("human.pedestrian.stroller", (0.9, 0.6, 1.1), (0.1, 0.1, 0.1), 0.2, cart),
        Model("movable_object.debris", (0.8, 0.9, 0.5), (0.3, 0.3, 0.3), 0.2, cart),
    ),
}
"""Kinds of objects by the name that placement uses. Mean sizes and spreads follow nuScenes trainval."""


def draw_model(kind: str, rng: np.random.Generator) -> Model:
    """One of the models of a kind, by weight."""
    models = MODELS[kind]
    return models[int(rng.choice(len(models), p=[m.weight for m in models]))]
