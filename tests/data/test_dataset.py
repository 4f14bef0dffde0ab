import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpq_train.common.errors import UserError
from cpq_train.data.augmentation import Augmentation
from cpq_train.data.dataset import DetectionDataset, Item, SampleConfig, collate, target_boxes
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.sweeps import CloudError

CONFIG = SampleConfig(
    num_sweeps=10,
    voxel_size=(0.1, 0.1, 0.2),
    point_cloud_range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    max_points_per_voxel=10,
    max_num_voxels=60000,
)


def dataset(index: NuScenesIndex, split: str = "val", **changes: Any) -> DetectionDataset:
    return DetectionDataset(index, index.sample_rows(split), dataclasses.replace(CONFIG, **changes))


def training_dataset(index: NuScenesIndex, **changes: Any) -> DetectionDataset:
    return dataset(index, "train", is_training=True, augmentation=Augmentation(), **changes)


def equal(first: Item, second: Item) -> bool:
    keys = ("voxel_features", "voxel_coords", "gt_boxes")
    return all(torch.equal(first[key], second[key]) for key in keys)  # type: ignore[literal-required]


@pytest.mark.parametrize("i", range(4))
def test_items_equal_golden(index: NuScenesIndex, golden_dir: Path, i: int) -> None:
    golden = np.load(golden_dir / "golden_infos.npz")
    item = dataset(index)[i]
    np.testing.assert_allclose(item["gt_boxes"].numpy(), golden[f"val{i}_item_gt_boxes"], atol=1e-5, rtol=0)
    cells = item["voxel_coords"].numpy()
    ordered = cells[np.lexsort(cells.T[::-1])]
    np.testing.assert_array_equal(ordered, golden[f"val{i}_item_voxel_coords_sorted"])
    assert item["token"] == index.sample_token(item["sample_row"])


def test_mean_features_lie_in_their_voxels(index: NuScenesIndex) -> None:
    item = dataset(index)[0]
    low, size = torch.tensor(CONFIG.point_cloud_range[:3]), torch.tensor(CONFIG.voxel_size)
    corners = low + item["voxel_coords"].flip(1) * size
    inside = (item["voxel_features"][:, :3] - corners) / size
    assert inside.min() > -1e-3
    assert inside.max() < 1 + 1e-3
    assert item["voxel_features"][:, 4].max() < 0.5


def test_real_key_frames(real_index: NuScenesIndex, real_tokens: list[str]) -> None:
    rows = real_index.sample_rows("val", real_tokens)
    batch = collate(list(DetectionDataset(real_index, rows, dataclasses.replace(CONFIG, num_sweeps=1))))
    assert batch["tokens"] == real_tokens
    assert torch.bincount(batch["voxel_coords"][:, 0]).min() > 10000
    num_boxes = (batch["gt_boxes"][:, :, 9] > 0).sum(dim=1)
    where = [real_index.annotations(row) for row in rows]
    assert [w.stop - w.start for w in where] == [23, 55]
    assert 0 < num_boxes[0] <= 23
    assert 23 < num_boxes[1] <= 55
    with pytest.raises(CloudError, match="cannot be read"):
        DetectionDataset(real_index, real_index.sample_rows("val"), CONFIG)[1]


def test_evaluation_is_deterministic_and_ignores_the_seed(index: NuScenesIndex) -> None:
    capped = {"max_num_voxels": 300, "max_points_per_voxel": 2}
    first, second = dataset(index, **capped)[1], dataset(index, seed=7, **capped)[1]
    assert len(first["voxel_coords"]) == 300
    assert equal(first, second)


def test_capped_voxels_are_lost_at_random(index: NuScenesIndex) -> None:
    """Not always those of the oldest sweeps."""
    kept = dataset(index, max_num_voxels=300)[1]["voxel_features"][:, 4]
    assert kept.max() > 0.4


def test_training_draws_depend_on_seed_epoch_and_position_alone(index: NuScenesIndex) -> None:
    train, other_seed = training_dataset(index), training_dataset(index, seed=1)
    item = train[(3, 2)]
    assert equal(item, training_dataset(index)[(3, 2)])
    assert not equal(item, train[(4, 2)])
    assert not equal(item, other_seed[(3, 2)])


def test_a_sample_that_comes_twice_is_drawn_twice(index: NuScenesIndex) -> None:
    rows = index.sample_rows("train")[[2, 0, 2]]
    train = DetectionDataset(index, rows, training_dataset(index).config)
    first, third = train[(3, 0)], train[(3, 2)]
    assert first["sample_row"] == third["sample_row"]
    assert not equal(first, third)
    evaluated = DetectionDataset(index, rows, CONFIG)
    assert equal(evaluated[0], evaluated[2])


def test_training_boxes_are_objects_with_points_inside_the_range(index: NuScenesIndex) -> None:
    near = (-12.8, -12.8, -5.0, 12.8, 12.8, 3.0)
    everywhere = dataset(index, "train", point_cloud_range=near)[0]["gt_boxes"]
    inside = dataset(index, "train", point_cloud_range=near, is_training=True)[0]["gt_boxes"]
    assert 0 < len(inside) < len(everywhere) == len(target_boxes(index, int(index.sample_rows("train")[0])))
    assert inside[:, :2].abs().max() <= 12.8
    assert everywhere[:, :2].abs().max() > 12.8
    assert inside[:, 9].min() >= 1
    assert not torch.isnan(everywhere).any()


def test_sample_without_boxes_is_replaced_in_training_only(index: NuScenesIndex) -> None:
    rows = index.sample_rows("train")
    leftmost = sorted(target_boxes(index, row)[:, 0].min() for row in rows)
    edge = -51.2 + 0.1 * np.ceil((leftmost[1] + 51.2) / 0.1)  # two samples have boxes to the left of it
    with_boxes = {int(row) for row in rows if target_boxes(index, row)[:, 0].min() <= edge}
    assert 0 < len(with_boxes) < 4
    left = {"point_cloud_range": (-51.2, -51.2, -5.0, float(edge), 51.2, 3.0)}
    train = dataset(index, "train", is_training=True, **left)
    items = [train[(0, i)] for i in range(4)]
    assert {item["sample_row"] for item in items} <= with_boxes
    assert all(len(item["gt_boxes"]) for item in items)
    assert all(equal(item, train[(0, i)]) for i, item in enumerate(items))
    evaluated = dataset(index, "train", **left)
    assert [evaluated[i]["sample_row"] for i in range(4)] == rows.tolist()


def test_no_box_anywhere_is_an_error(index: NuScenesIndex) -> None:
    train = dataset(
        index, "train", is_training=True, point_cloud_range=(-51.2, -51.2, 10.0, 51.2, 51.2, 12.0)
    )
    with pytest.raises(UserError, match="4 draws found no sample with an object"):
        train[0]


def test_collate(index: NuScenesIndex) -> None:
    items = list(dataset(index))
    batch = collate(items)
    assert batch["batch_size"] == 4
    assert batch["voxel_coords"].dtype == torch.int32
    assert batch["sample_rows"].dtype == torch.int64
    assert batch["gt_boxes"].dtype == torch.float32
    for b, item in enumerate(items):
        is_own = batch["voxel_coords"][:, 0] == b
        assert torch.equal(batch["voxel_coords"][is_own, 1:], item["voxel_coords"])
        assert torch.equal(batch["voxel_features"][is_own], item["voxel_features"])
        num_boxes = len(item["gt_boxes"])
        assert torch.equal(batch["gt_boxes"][b, :num_boxes], item["gt_boxes"])
        assert not batch["gt_boxes"][b, num_boxes:].any()


@pytest.mark.parametrize("num_sweeps", [0, 11])
def test_wrong_number_of_sweeps(num_sweeps: int) -> None:
    with pytest.raises(UserError, match=f"num_sweeps is {num_sweeps}: expected 1 to 10"):
        dataclasses.replace(CONFIG, num_sweeps=num_sweeps)
