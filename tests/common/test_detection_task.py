"""Classes and rules: nuScenes' against nuscenes-devkit, own ones as they are written and read."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
from nuscenes.eval.detection.utils import category_to_detection_name

from cpq_train.common.detection_task import MAX_NUM_CLASSES, NUSCENES, DetectionClass, DetectionTask
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
        ({"": POST}, "''.*printable"),
        ({"a\nb": POST}, "printable"),
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


def test_names_of_no_class() -> None:
    with pytest.raises(UserError, match=r"class_names names 'car': accepted of data.classes are tram, post"):
        OWN.ids(["tram", "car"])
    with pytest.raises(UserError, match="accepted with nuScenes data are car, truck"):
        NUSCENES.ids(["tram"])


def test_a_damaged_task() -> None:
    with pytest.raises(UserError, match="here, tram, range_m: got 'far'"):
        DetectionTask.from_dict({"tram": {"categories": ["a"], "range_m": "far"}}, "here")
