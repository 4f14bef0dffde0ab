"""Labels of a network that has other class names than nuScenes, or the same in another order."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from test_gt_sampling import BUS, CAR, TRUCK, labelled, made_up

from cpq_train.common.detection_task import NUSCENES
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.class_balance import class_balanced_rows, class_presence, num_draws
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import target_boxes
from cpq_train.data.gt_sampling import GtSampler, GtSampling
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.labels import labels_of_ids

FEW = ("bus", "pedestrian", "car")


def test_numbers_by_hand() -> None:
    assert NUSCENES.ids(FEW).tolist() == [3, 8, 0]
    assert labels_of_ids(FEW).tolist() == [3, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0]
    assert labels_of_ids(DETECTION_CLASSES)[[0, 9, -1]].tolist() == [1, 10, 0]


@pytest.mark.parametrize("names", [DETECTION_CLASSES[::-1], FEW])
def test_labels_of_target_boxes(index: NuScenesIndex, names: tuple[str, ...]) -> None:
    num_boxes = 0
    for row in range(len(index)):
        usual = target_boxes(index, row)
        classes = [DETECTION_CLASSES[int(label) - 1] for label in usual[:, 9]]
        is_target = np.array([name in names for name in classes])
        boxes = target_boxes(index, row, names)
        np.testing.assert_array_equal(boxes[:, :9], usual[is_target, :9])
        assert [names[int(label) - 1] for label in boxes[:, 9]] == [n for n in classes if n in names]
        num_boxes += len(boxes)
    assert num_boxes


def test_classes_without_a_name_are_not_sampled() -> None:
    database = made_up((CAR, 10.0, 0.0, 5), (TRUCK, 20.0, 0.0, 5), (BUS, 30.0, 0.0, 5), (BUS, 40.0, 0.0, 5))
    sampler = GtSampler(database, GtSampling({"bus": 2, "truck": 2, "car": 2}), FEW)
    boxes = labelled((2, 0.0, 0.0), (2, -9.0, 0.0))  # label 3: two cars, which are enough
    points = np.zeros((0, 5), dtype=np.float32)
    _, filled = sampler.fill(points, boxes, boxes[:, :9], np.random.default_rng(0))
    assert filled[:, 9].tolist() == [3, 3, 1, 1]
    with pytest.raises(UserError, match="holds no object with 5 points or more"):
        GtSampler(database, GtSampling({"truck": 2}), FEW)


def test_only_named_classes_are_balanced(real_index: NuScenesIndex) -> None:
    rows = real_index.sample_rows("val")
    names = DETECTION_CLASSES[::-1]
    usual = class_balanced_rows(real_index, rows, 0)
    np.testing.assert_array_equal(class_balanced_rows(real_index, rows, 0, names), usual)
    shown = class_presence(real_index, rows)[:, [DETECTION_CLASSES.index(name) for name in FEW]]
    drawn = class_balanced_rows(real_index, rows, 0, FEW)
    assert len(drawn) == sum(num_draws(shown.sum(axis=0).tolist())) > 0
    assert set(drawn.tolist()) <= set(rows[shown.any(axis=1)].tolist())


def test_a_name_that_nuscenes_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"class_names names 'tram': accepted with nuScenes data are car, "):
        NuScenesDataModule(str(tmp_path), class_names=("car", "tram"))
    data = NuScenesDataModule(str(tmp_path))
    assert data.class_names == DETECTION_CLASSES
    assert dataclasses.asdict(data.evaluation_config)["class_names"] == DETECTION_CLASSES
