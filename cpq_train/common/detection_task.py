"""What is detected, and by which rules it is scored: the classes of nuScenes, or a data set's own.

A class id is an index into the classes of a task, -1 is an object outside of it. The sources of nuScenes'
rules are nuscenes-devkit 1.2.0 (`detection_cvpr_2019.json`, `eval/detection/algo.py`) and, for the attribute
that a detection gets, OpenPCDet's `nuscenes_utils.transform_det_annos_to_nusc_annos`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cpq_train.common.errors import UserError, shown
from cpq_train.common.nuscenes import ATTRIBUTES, CATEGORY_TO_CLASS, DETECTION_CLASSES, TP_ERRORS
from cpq_train.common.schema import mapping_to, validated_plain

MAX_NUM_CLASSES = 127
"""Class ids are kept in a byte."""

MAX_RANGE_M = 1000.0
_RANGE_DECIMALS = 1
"""Of class ranges in metres: range bins are called after them."""
_RESERVED = ("mAP", "*")
"""What scores of a range bin, and `compare --fail_if`, call all classes."""
_NEAR_M = 20.0
"""Upper end of the nearest range bin."""


@dataclass(frozen=True)
class DetectionClass:
    """A class of objects, and how it is scored.

    Attributes:
        categories: names in table `category` of the objects that belong to it.
        range_m: boxes at this distance from the ego vehicle or further count neither as ground truth nor as
            detections; a multiple of 0.1 m.
        attributes: names in table `attribute`: that of an object at rest, that of one that moves (above 0.2
            m/s), and further ones that annotations have; none, or two and more. An annotation without one has
            no attribute error.
        undefined_errors: true-positive errors that the class has not, such as AOE and AVE of what has no
            heading and does not move; without attributes it has no AAE either.
        is_symmetric: whether front and back are the same, so that a yaw half a turn off is no error.
        is_ignored_in_racks: whether it counts neither as ground truth nor as a detection inside a bicycle
            rack (category static_object.bicycle_rack).
    """

    categories: tuple[str, ...]
    range_m: float = 50.0
    attributes: tuple[str, ...] = ()
    undefined_errors: tuple[str, ...] = ()
    is_symmetric: bool = False
    is_ignored_in_racks: bool = False

    def __post_init__(self) -> None:
        for name in ("categories", "attributes", "undefined_errors"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"{name} of a class are {shown(value)}; accepted: a list of names")
            object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class DetectionTask:
    """Classes and their rules.

    Attributes:
        names: of the classes, by class id.
        rules: likewise.

    Raises:
        UserError: there is no class, one has a name, a category or a rule that is not accepted, or two share
            a category.
    """

    names: tuple[str, ...]
    rules: tuple[DetectionClass, ...]

    def __reduce__(self) -> str | tuple[type[DetectionTask], tuple[Any, ...]]:
        """Pickles as little as there is to say."""
        return "NUSCENES" if self is NUSCENES else (DetectionTask, (self.names, self.rules))

    @staticmethod
    def of(classes: Mapping[str, DetectionClass] | None) -> DetectionTask:
        """The task of these classes; that of nuScenes where there are none."""
        return NUSCENES if classes is None else DetectionTask(tuple(classes), tuple(classes.values()))

    def __post_init__(self) -> None:
        _check_classes(dict(zip(self.names, self.rules, strict=True)), "data.classes")

    @cached_property
    def is_nuscenes(self) -> bool:
        """Whether the classes are nuScenes' ten with their rules, in whatever order: they have an NDS."""
        return self.to_dict() == NUSCENES.to_dict()

    @cached_property
    def class_of_category(self) -> dict[str, int]:
        """Class id of each category that belongs to one."""
        ids = enumerate(self.rules)
        return {category: class_id for class_id, rules in ids for category in rules.categories}

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """Names of all attributes, nuScenes' first; an attribute id is an index into them, -1 is none."""
        own = {name: None for rules in self.rules for name in rules.attributes if name not in ATTRIBUTES}
        return (*ATTRIBUTES, *own)

    @cached_property
    def slow_and_fast(self) -> NDArray[np.int64]:
        """(classes, 2) attribute id that a detection at rest and a moving one get, -1 for none."""
        pairs = [rules.attributes[:2] for rules in self.rules]
        return np.array([[self.attributes.index(name) for name in pair] or [-1, -1] for pair in pairs])

    @cached_property
    def ranges_m(self) -> NDArray[np.float64]:
        """(classes,) class ranges."""
        return np.array([rules.range_m for rules in self.rules])

    @cached_property
    def defined_errors(self) -> NDArray[np.bool_]:
        """(classes, errors) which of `TP_ERRORS` exist; a class without attributes has no attribute error."""
        undefined = [
            {*rules.undefined_errors, *(() if rules.attributes else ("AAE",))} for rules in self.rules
        ]
        return np.array([[error not in of_class for error in TP_ERRORS] for of_class in undefined])

    @cached_property
    def range_bins_m(self) -> tuple[tuple[float, float], ...]:
        """Half-open bins [lower, upper) of the distance from the ego vehicle, up to the class ranges."""
        far = float(self.ranges_m.max())
        edges = sorted({0.0, min(_NEAR_M, far), *self.ranges_m.tolist()})
        return tuple(pairwise(edges))

    def ids(self, class_names: Sequence[str]) -> NDArray[np.int64]:
        """Class ids (C,) of names.

        Raises:
            UserError: a name is that of no class.
        """
        for name in class_names:
            if name not in self.names:
                where = "of data.classes" if self is not NUSCENES else "with nuScenes data"
                raise UserError(
                    f"class_names names {shown(name)}: accepted {where} are {', '.join(self.names)}"
                )
        return np.array([self.names.index(name) for name in class_names], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {name: asdict(rules) for name, rules in zip(self.names, self.rules, strict=True)}

    @staticmethod
    def from_dict(content: Any, where: str) -> DetectionTask:
        """What `to_dict` gave.

        Args:
            content: plain values.
            where: what they are of, for messages.

        Raises:
            UserError: they are something else.
        """
        classes = validated_plain(_CLASSES, content, where)
        _check_classes(classes, where)
        return DetectionTask.of(classes)


def check_option(content: Mapping[Any, Any], name: str) -> None:
    """Look at classes as a person writes them, while it is known which of them a value is of.

    Args:
        content: plain values.
        name: of the option.

    Raises:
        UserError: they are something else than `DetectionTask.to_dict` gives, where defaults may lack.
    """
    for of_class, rules in content.items():
        where = f"{name}, {of_class}"
        for key in rules if isinstance(rules, Mapping) else ():
            if key not in _KEYS:
                raise UserError(f"{where}: unknown key {shown(key)}; accepted: {', '.join(_KEYS)}")
        validated_plain(_CLASS, rules, where)
    DetectionTask.from_dict(content, name)


def _check_classes(classes: Mapping[str, DetectionClass], where: str) -> None:
    if not 1 <= len(classes) <= MAX_NUM_CLASSES:
        raise UserError(f"{where} are {len(classes)}; accepted: 1 to {MAX_NUM_CLASSES}")
    owners: dict[str, str] = {}
    for name, rules in classes.items():
        _check_name(name, where)
        _check_rules(rules, f"{where} {shown(name)}")
        for category in rules.categories:
            if owners.setdefault(category, name) != name:
                raise UserError(
                    f"{where} {name} and {owners[category]} both have category {shown(category)}; "
                    "accepted: each category once"
                )


def _check_name(name: str, where: str) -> None:
    is_text = isinstance(name, str) and name != "" and name.isprintable()
    if not is_text or name != name.strip() or name in _RESERVED or any(sign in name for sign in ":<>"):
        raise UserError(
            f"{where}: a name is {shown(name)}; accepted: names of printable characters but : < >, "
            f"without spaces around them, other than {' and '.join(_RESERVED)}"
        )


def _check_rules(rules: DetectionClass, where: str) -> None:
    if not rules.categories or not all(rules.categories):
        raise UserError(f"{where}, categories are {list(rules.categories)}; accepted: one name or more")
    if not 0 < rules.range_m <= MAX_RANGE_M or round(rules.range_m, _RANGE_DECIMALS) != rules.range_m:
        raise UserError(
            f"{where}, range_m is {rules.range_m}; accepted: above 0, up to {MAX_RANGE_M:g} m, a multiple of "
            "0.1 m"
        )
    if len(rules.attributes) == 1 or len(set(rules.attributes)) < len(rules.attributes):
        raise UserError(
            f"{where}, attributes are {list(rules.attributes)}; accepted: none, or that of an object at "
            "rest, that of a moving one and any further ones, each once"
        )
    if unknown := set(rules.undefined_errors) - set(TP_ERRORS):
        raise UserError(
            f"{where}, undefined_errors hold {', '.join(sorted(unknown))}; accepted: {', '.join(TP_ERRORS)}"
        )


_CLASSES: TypeAdapter[dict[str, DetectionClass]] = TypeAdapter(mapping_to(DetectionClass))
_CLASS: TypeAdapter[DetectionClass] = TypeAdapter(DetectionClass)
_KEYS = [field.name for field in fields(DetectionClass)]

_VEHICLE = ("vehicle.parked", "vehicle.moving", "vehicle.stopped")
_BUS = ("vehicle.stopped", "vehicle.moving", "vehicle.parked")
_CYCLE = ("cycle.without_rider", "cycle.with_rider")
_PEDESTRIAN = ("pedestrian.standing", "pedestrian.moving", "pedestrian.sitting_lying_down")
_RULES: dict[str, dict[str, Any]] = {
    "car": {"range_m": 50.0, "attributes": _VEHICLE},
    "truck": {"range_m": 50.0, "attributes": _VEHICLE},
    "construction_vehicle": {"range_m": 50.0, "attributes": _VEHICLE},
    "bus": {"range_m": 50.0, "attributes": _BUS},
    "trailer": {"range_m": 50.0, "attributes": _VEHICLE},
    "barrier": {"range_m": 30.0, "undefined_errors": ("AVE",), "is_symmetric": True},
    "motorcycle": {"range_m": 40.0, "attributes": _CYCLE, "is_ignored_in_racks": True},
    "bicycle": {"range_m": 40.0, "attributes": _CYCLE, "is_ignored_in_racks": True},
    "pedestrian": {"range_m": 40.0, "attributes": _PEDESTRIAN},
    "traffic_cone": {"range_m": 30.0, "undefined_errors": ("AOE", "AVE")},
}


def _categories_of(name: str) -> tuple[str, ...]:
    return tuple(category for category, owner in CATEGORY_TO_CLASS.items() if owner == name)


NUSCENES = DetectionTask(
    DETECTION_CLASSES,
    tuple(DetectionClass(_categories_of(name), **_RULES[name]) for name in DETECTION_CLASSES),
)
"""The nuScenes detection task."""
