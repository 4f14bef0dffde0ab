"""Targets and decoding without golden data: edge cases, and that they are inverse to each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import of_head
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import CLASS_GROUPS, DETECTION_CLASSES
from cpq_train.models import (
    BOX_BRANCHES,
    NetworkConfig,
    PostProcessing,
    Targets,
    assign_targets,
    center_loss,
    decode,
)

CONFIG = NetworkConfig(point_cloud_range=(-6.4, -12.8, -5.0, 19.2, 25.6, 3.0))
POST = PostProcessing()


def some_boxes(num_boxes: int = 12, batch_size: int = 2) -> Tensor:
    """Boxes of all classes, well apart so that none suppresses another."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((batch_size, num_boxes, 10), generator=generator)
    place = torch.randperm(6 * 9, generator=generator)[:num_boxes]
    boxes[..., 0] = -5.5 + 4 * (place % 6) + boxes[..., 0]
    boxes[..., 1] = -12.0 + 4 * (place // 6) + boxes[..., 1]
    boxes[..., 3:6] = 0.5 + 1.5 * boxes[..., 3:6]
    boxes[..., 6] = 6 * boxes[..., 6] - 3
    boxes[..., 9] = torch.arange(num_boxes) % 10 + 1
    return boxes


def perfect_heads(targets: Targets, config: NetworkConfig = CONFIG) -> list[dict[str, Tensor]]:
    """Raw outputs that say exactly what the targets want."""
    heads = []
    for head in range(len(config.class_groups)):
        target = of_head(targets, head, config)
        batch_size, _, height, width = target.heatmap.shape
        code = torch.zeros(batch_size, 10, height * width)
        for sample, _, slot in target.mask.nonzero().tolist():
            code[sample, :, target.indices[sample, 0, slot]] = target.boxes[sample, 0, slot]
        parts = code.view(batch_size, 10, height, width).split(list(BOX_BRANCHES.values()), dim=1)
        peaks = torch.where(target.heatmap == 1, 0.9, 0.01).logit()
        heads.append({**dict(zip(BOX_BRANCHES, parts, strict=True)), "hm": peaks})
    return heads


@pytest.mark.parametrize("groups", [CLASS_GROUPS, (("pedestrian", "car"), ("bus", "bicycle", "truck"))])
def test_decoding_inverts_the_targets(groups: tuple[tuple[str, ...], ...]) -> None:
    gt_boxes = some_boxes()
    config = replace(CONFIG, class_groups=groups)
    found = decode(perfect_heads(assign_targets(gt_boxes, config), config), config, POST)
    wanted_ids = {DETECTION_CLASSES.index(name) for group in groups for name in group}
    for sample, detections in enumerate(found):
        expected = {int(row[9]) - 1: [] for row in gt_boxes[sample] if int(row[9]) - 1 in wanted_ids}
        for row in gt_boxes[sample]:
            if int(row[9]) - 1 in wanted_ids:
                expected[int(row[9]) - 1].append(row[:9])
        assert sorted(detections.labels.tolist()) == sorted(i for i, rows in expected.items() for _ in rows)
        for class_id, rows in expected.items():
            boxes = detections.boxes[detections.labels == class_id]
            for row in rows:
                assert (boxes - row).abs().max(1).values.min() < 1e-4


def test_the_order_of_class_names_changes_ids_alone() -> None:
    config = replace(CONFIG, class_names=DETECTION_CLASSES[::-1])
    gt_boxes, permuted = some_boxes(), some_boxes()
    permuted[..., 9] = 11 - gt_boxes[..., 9]
    targets = assign_targets(gt_boxes, CONFIG)
    for ours, theirs in zip(assign_targets(permuted, config), targets, strict=True):
        assert torch.equal(ours, theirs)
    heads = perfect_heads(targets)
    for ours, theirs in zip(decode(heads, config, POST), decode(heads, CONFIG, POST), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert [config.class_names[i] for i in ours.labels] == [DETECTION_CLASSES[i] for i in theirs.labels]


def test_foreign_classes_and_padding_have_no_target() -> None:
    gt_boxes = some_boxes()
    gt_boxes[..., 9] = torch.tensor([0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    target = assign_targets(gt_boxes, replace(CONFIG, class_groups=(("car",),)))
    assert target.heatmap.max() == 0
    assert not target.mask.any()


def test_no_boxes() -> None:
    targets = assign_targets(torch.zeros(2, 0, 10), CONFIG)
    assert targets.boxes.shape == (2, 6, 500, 10)
    heads = [
        {**{k: torch.zeros(2, c, 48, 32) for k, c in BOX_BRANCHES.items()}, "hm": heatmap - 2.19}
        for heatmap in targets.heatmap.split([len(group) for group in CLASS_GROUPS], dim=1)
    ]
    losses = center_loss(heads, targets)
    assert losses["loss"] > 0
    assert losses["loc_loss_head_0"] == 0


def test_only_the_first_boxes_of_a_head_and_skipped_ones_keep_their_slot() -> None:
    gt_boxes = some_boxes()[:1]
    gt_boxes[..., 9] = 1
    gt_boxes[0, 1, 3] = 0
    gt_boxes[0, 2, 0] = torch.nan
    gt_boxes[0, 3, 4] = torch.inf
    target = assign_targets(gt_boxes, CONFIG, max_objects=6)
    assert target.mask[0, 0].tolist() == [True, False, False, False, True, True]
    assert int((target.heatmap == 1).sum()) == 3
    assert bool(target.heatmap.isfinite().all())


def test_a_box_outside_the_range_is_clamped_to_the_border_cell() -> None:
    gt_boxes = some_boxes(1, 1)
    gt_boxes[0, 0, :2] = torch.tensor([100.0, -100.0])
    gt_boxes[0, 0, 9] = 1
    target = assign_targets(gt_boxes, CONFIG)
    assert int(target.indices[0, 0, 0]) == CONFIG.geometry.width - 1
    assert target.boxes[0, 0, 0, :2].tolist() == [0.5, 0.0]


def test_losses_are_float32_under_autocast() -> None:
    targets = assign_targets(some_boxes(), CONFIG)
    heads = [{k: v.bfloat16() for k, v in head.items()} for head in perfect_heads(targets)]
    losses = center_loss(heads, targets)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    parts = sum(value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"], parts)


def flat_heads(logit: float, height: int = 4, width: int = 3) -> list[dict[str, Tensor]]:
    shape = {**BOX_BRANCHES, "hm": 2}
    heads = {name: torch.zeros(1, channels, height, width) for name, channels in shape.items()}
    heads["dim"] -= 3  # 5 cm: nothing overlaps
    heads["hm"] += logit
    return [heads]


SMALL_MAP = NetworkConfig(
    point_cloud_range=(0, 0, -5, 2.4, 3.2, 3),
    class_groups=(("truck", "construction_vehicle"),),
    backbone_2d_strides=(1, 1),
    upsample_strides=(1, 1),
)
"""Stride 8, 3 cells along x and 4 along y."""


def test_a_map_smaller_than_k_and_the_order_of_equal_scores() -> None:
    heads = flat_heads(2.0)
    (found,) = decode(heads, SMALL_MAP, PostProcessing(nms_iou=1.0))
    assert found.labels.tolist() == [1] * 12 + [2] * 12
    torch.testing.assert_close(found.boxes[:3, 0], torch.tensor([0.0, 0.8, 1.6]))
    assert len(decode(heads, SMALL_MAP, PostProcessing())[0].scores) == 12  # one class suppresses the other
    assert len(decode(heads, SMALL_MAP, PostProcessing(max_objects_per_head=5))[0].scores) == 5
    assert len(decode(heads, SMALL_MAP, PostProcessing(nms_post=7))[0].scores) == 7


def test_no_detections() -> None:
    (found,) = decode(flat_heads(-5.0), SMALL_MAP, POST)
    assert found.boxes.shape == (0, 9)
    assert found.scores.shape == (0,)
    assert found.labels.dtype == torch.int64


def test_the_score_threshold_is_strict_and_the_range_inclusive() -> None:
    score = torch.tensor(0.0).sigmoid().item()
    assert len(decode(flat_heads(0.0), SMALL_MAP, PostProcessing(score_threshold=score))[0].scores) == 0
    narrow = PostProcessing(center_range=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), nms_iou=1.0)
    assert len(decode(flat_heads(0.0), SMALL_MAP, narrow)[0].scores) == 2


def found_at_90_m(config: NetworkConfig, post: PostProcessing) -> list[float]:
    """Where a car 90 m ahead, and 4 m to the side, is found."""
    box = torch.tensor([[[4.0, 90.0, -1.0, 4.5, 1.9, 1.6, 0.5, 3.0, 0.0, 1.0]]])
    (found,) = decode(perfect_heads(assign_targets(box, config), config), config, post)
    return [round(number, 3) for number in found.boxes[:, :2].flatten().tolist()]


WIDE = NetworkConfig(point_cloud_range=(-12.8, -102.4, -5, 12.8, 102.4, 3), class_groups=(("car",),))


def test_a_box_as_far_as_the_range_reaches_is_kept() -> None:
    assert found_at_90_m(WIDE, PostProcessing()) == [4.0, 90.0]


def test_a_center_range_that_is_set_is_taken_as_it_is() -> None:
    published = PostProcessing(center_range=(-61.2, -61.2, -10.0, 61.2, 61.2, 10.0))
    assert found_at_90_m(WIDE, published) == []
    assert published.reaching(WIDE.point_cloud_range) is published


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (NetworkConfig().point_cloud_range, (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)),
        ((-54, -54, -5, 54, 54, 3), (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)),
        ((-100, 0, -12, 50, 200, 3), (-100.0, -61.2, -12.0, 61.2, 200.0, 10.0)),
    ],
)
def test_the_center_range_follows_the_point_cloud_range(
    reach: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    found = PostProcessing().reaching(reach).center_range
    assert found == expected
    assert set(map(type, found or ())) == {float}  # whole numbers would have another hash


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nms_pre": 0}, "nms_pre is 0: expected 1 or more"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5"),
        ({"center_range": (0.0, 1.0)}, "center_range .* 6 values"),
    ],
)
def test_mistakes_in_post_processing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PostProcessing(**fields)


@pytest.mark.cuda
def test_cuda_gives_the_same_targets_and_detections() -> None:
    gt_boxes = some_boxes()
    targets = assign_targets(gt_boxes, CONFIG)
    for on_cuda, on_cpu in zip(assign_targets(gt_boxes.cuda(), CONFIG), targets, strict=True):
        torch.testing.assert_close(on_cuda.cpu(), on_cpu)
    heads = perfect_heads(targets)
    moved = [{name: value.cuda() for name, value in head.items()} for head in heads]
    for here, there in zip(decode(heads, CONFIG, POST), decode(moved, CONFIG, POST), strict=True):
        assert torch.equal(here.labels, there.labels.cpu())
        torch.testing.assert_close(here.boxes, there.boxes.cpu())
