"""Classes and rules: nuScenes' against nuscenes-devkit, own ones as they are written and read."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
from nuscenes.eval.detection.utils import category_to_detection_name

from cpq_train.common.detection_task import (
    MAX_NUM_CLASSES,
    NUSCENES,
    DetectionClass,
    DetectionTask,
    check_option,
)
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import CATEGORY_TO_CLASS, DETECTION_CLASSES, TP_ERRORS

TRAM = DetectionClass(("rail.tram",), 80.0, ("rail.halted", "rail.moving", "vehicle.parked"))
POST = DetectionClass(("street.post",), 25.0, undefined_errors=("AOE", "AVE"), is_symmetric=True)
OWN = DetectionTask.of({"tram": TRAM, "post": POST})


def test_nuscenes_is_what_the_devkit_says() -> None:
    assert dict(zip(NUSCENES.names, NUSCENES.ranges_m, strict=True)) == (
        config_factory("detection_cvpr_2019").class_range
    )
    assert set(NUSCENES.attributes) == set(ATTRIBUTE_NAMES)
    for category, class_id in NUSCENES.class_of_category.items():
        assert category_to_detection_name(category) == NUSCENES.names[class_id]
    assert NUSCENES.class_of_category.keys() == CATEGORY_TO_CLASS.keys()


def test_nuscenes_rules_by_hand() -> None:
    undefined = {
        (DETECTION_CLASSES[row], TP_ERRORS[column]) for row, column in np.argwhere(~NUSCENES.defined_errors)
    }
    assert undefined == {
        *(("traffic_cone", error) for error in ("AOE", "AVE", "AAE")),
        *(("barrier", error) for error in ("AVE", "AAE")),
    }
    assert NUSCENES.range_bins_m == ((0, 20), (20, 30), (30, 40), (40, 50))
    assert [n for n, r in zip(NUSCENES.names, NUSCENES.rules, strict=True) if r.is_symmetric] == ["barrier"]
    slow, fast = NUSCENES.slow_and_fast[NUSCENES.names.index("bus")]
    assert (NUSCENES.attributes[slow], NUSCENES.attributes[fast]) == ("vehicle.stopped", "vehicle.moving")
    assert NUSCENES.slow_and_fast[NUSCENES.names.index("barrier")].tolist() == [-1, -1]


def test_own_classes() -> None:
    assert not OWN.is_nuscenes
    assert OWN.class_of_category == {"rail.tram": 0, "street.post": 1}
    assert OWN.attributes[8:] == ("rail.halted", "rail.moving")
    assert OWN.slow_and_fast.tolist() == [[8, 9], [-1, -1]]
    assert OWN.range_bins_m == ((0, 20), (20, 25), (25, 80))
    assert OWN.defined_errors.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert DetectionTask.of({"post": replace(POST, range_m=15.0)}).range_bins_m == ((0, 15),)


def test_the_ten_in_another_order_still_have_an_nds_and_with_another_range_have_not() -> None:
    classes = dict(zip(NUSCENES.names, NUSCENES.rules, strict=True))
    turned = DetectionTask.of(dict(reversed(classes.items())))
    assert turned.is_nuscenes
    assert turned != NUSCENES
    assert not DetectionTask.of(classes | {"car": replace(classes["car"], range_m=60.0)}).is_nuscenes
    assert DetectionTask.of(None) is NUSCENES


@pytest.mark.parametrize("task", [NUSCENES, OWN])
def test_files_and_processes_get_the_same_task(task: DetectionTask) -> None:
    assert DetectionTask.from_dict(task.to_dict(), "here") == task
    copy = pickle.loads(pickle.dumps(task))
    assert copy == task
    assert copy is task or task is OWN
    assert len(pickle.dumps(NUSCENES)) < 100


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "data.classes are 0; accepted: 1 to 127"),
        ({f"c{i}": DetectionClass((f"c{i}",)) for i in range(MAX_NUM_CLASSES + 1)}, "are 128; accepted"),
        ({"": POST}, "data.classes: a name is ''; accepted: names of printable"),
        ({"a\nb": POST}, "printable"),
        ({"mAP": POST}, r"a name is 'mAP'; accepted: .*other than mAP and \*"),
        ({"*": POST}, r"a name is '\*'"),
        ({"a:b": POST}, "a name is 'a:b'; accepted: .*but : < >"),
        ({"<a": POST}, "a name is '<a'"),
        ({"a>": POST}, "a name is 'a>'"),
        ({" a": POST}, "a name is ' a'; accepted: .*without spaces around them"),
        ({"a ": POST}, "a name is 'a '"),
        ({3: POST}, "a name is 3"),
        ({"a": replace(POST, range_m=25.04)}, r"range_m is 25\.04; accepted: .*a multiple of 0\.1 m"),
        ({"a": replace(POST, range_m=30.0000001)}, r"range_m is 30\.0000001"),
        ({"a": DetectionClass(())}, r"'a', categories are \[\]; accepted: one name or more"),
        ({"a": DetectionClass(("",))}, r"categories are \[''\]"),
        ({"a": replace(POST, range_m=0.0)}, r"'a', range_m is 0\.0; accepted: above 0, up to 1000 m"),
        ({"a": replace(POST, range_m=float("nan"))}, "range_m is nan"),
        (
            {"a": replace(POST, attributes=("x",))},
            "attributes are .*accepted: none, or that of an object at rest",
        ),
        ({"a": replace(POST, attributes=("x", "y", "x"))}, "each once"),
        ({"a": replace(POST, undefined_errors=("AP",))}, "undefined_errors hold AP; accepted: ATE, ASE"),
        ({"a": POST, "b": POST}, "data.classes b and a both have category 'street.post'"),
    ],
)
def test_wrong_classes(classes: dict[str, DetectionClass], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DetectionTask.of(classes)


def test_every_accepted_range_has_a_bin_of_its_own_name() -> None:
    names = {f"{tenths / 10:g}" for tenths in range(1, 10_001)}
    assert len(names) == 10_000
    tasks = [DetectionTask.of({"a": replace(POST, range_m=tenths / 10)}) for tenths in (1, 3, 251, 9999)]
    assert [task.range_bins_m[-1][1] for task in tasks] == [0.1, 0.3, 25.1, 999.9]


@pytest.mark.parametrize("key", ["categories", "attributes", "undefined_errors"])
def test_a_text_is_no_list_of_letters(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} of a class are 'mensch'; accepted: a list of names"):
        replace(POST, **{key: "mensch"})


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"categories": ["a"], "range_m": "x"}, "range_m: got 'x', accepted: a number"),
        ({"categories": ["a"], "range_m": "60"}, "range_m: got '60', accepted: a number"),
        ({"categories": "mensch"}, "categories: got 'mensch', accepted: a list"),
        ({"categories": ["a", 3]}, "category 2: got 3, accepted: a text"),
        ({"categories": ["a"], "is_symmetric": "maybe"}, "is_symmetric: got 'maybe', accepted: true, false"),
    ],
)
def test_a_wrong_value_of_an_option_is_told_with_its_class(rules: dict[str, Any], message: str) -> None:
    classes = {"tram": {"categories": ["b"]}, "person": rules}
    with pytest.raises(UserError, match=f"^data.classes, person, {message}$"):
        check_option(classes, "data.classes")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"range_m": 3}, "data.classes, tram: needs 'categories', and has range_m"),
        (
            {"categories": ["a"], "rnage_m": 3},
            "data.classes, tram: unknown key 'rnage_m'; accepted: categories, ",
        ),
        (3, "data.classes, tram: got 3, accepted: a mapping"),
        ({"categories": ["a"], "range_m": -1.0}, "data.classes 'tram', range_m is -1"),
    ],
)
def test_a_wrong_class_of_an_option(rules: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        check_option({"tram": rules}, "data.classes")


def test_names_of_no_class() -> None:
    with pytest.raises(UserError, match=r"class_names names 'car': accepted of data.classes are tram, post"):
        OWN.ids(["tram", "car"])
    with pytest.raises(UserError, match="accepted with nuScenes data are car, truck"):
        NUSCENES.ids(["tram"])


def test_a_damaged_task() -> None:
    with pytest.raises(UserError, match="here, tram, range_m: got 'far'"):
        DetectionTask.from_dict({"tram": {"categories": ["a"], "range_m": "far"}}, "here")
    with pytest.raises(UserError, match=r"^here are 0; accepted: 1 to 127"):
        DetectionTask.from_dict({}, "here")
    with pytest.raises(UserError, match=r"^here 'tram', range_m is 0"):
        DetectionTask.from_dict({"tram": {"categories": ["a"], "range_m": 0}}, "here")
