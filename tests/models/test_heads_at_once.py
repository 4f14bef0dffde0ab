"""All heads at once against head by head, to the bit; and how often a GPU would be called, and waited for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from plain_heads import plain_box_error, plain_decode, plain_loss, plain_targets
from torch import Tensor

from cpq_train.common.kernels import as_on_gpu
from cpq_train.models import (
    BOX_BRANCHES,
    CODE_WEIGHTS,
    HeadOutput,
    NetworkConfig,
    PostProcessing,
    Targets,
    assign_targets,
    center_loss,
    decode,
    rotated_nms,
)
from cpq_train.models.distillation import DistillationConfig, Outputs, distillation_loss, peaks_of
from cpq_train.profiling.operator_count import Count, counting_operators
from cpq_train.training.losses import training_losses

TWO_HEADS = replace(
    SMALL,
    point_cloud_range=(-12.8, -6.4, -5.0, 12.8, 6.4, 3.0),
    class_groups=(("pedestrian", "car"), ("bus", "bicycle", "truck")),
)
"""32 cells along x and 16 along y; half of the classes have no head."""

NAN = float("nan")
place = st.one_of(st.floats(-12.8, 12.8), st.sampled_from([-12.8, 12.8, -6.4, 6.4, 0.0, -40.0, 40.0]))
size = st.one_of(st.floats(0.1, 25), st.sampled_from([0.0, -1.0, 0.1, 4.5]))
speed = st.one_of(st.floats(-9, 9), st.just(NAN))
angle = st.floats(-4, 4)
row = st.tuples(place, place, angle, size, size, size, angle, speed, speed, st.integers(0, 10)).map(list)
spoiled = st.tuples(st.integers(0, 6), st.sampled_from([NAN, float("inf"), -float("inf")]), row).map(
    lambda drawn: [*drawn[2][: drawn[0]], drawn[1], *drawn[2][drawn[0] + 1 :]]
)
samples = st.lists(st.lists(st.one_of(row, row, row, spoiled), max_size=12), min_size=1, max_size=3)


def padded(rows: list[list[list[float]]]) -> Tensor:
    """Boxes of samples, (B, M, 10), M possibly 0."""
    boxes = torch.zeros(len(rows), max(map(len, rows)), 10)
    for sample, of_sample in enumerate(rows):
        for number, values in enumerate(of_sample):
            boxes[sample, number] = torch.tensor(values, dtype=torch.float64).float()
    return boxes


def raw_heads(config: NetworkConfig, batch_size: int, seed: int, bias: float = -2.0) -> list[HeadOutput]:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.geometry.height, config.geometry.width)
    heads = [
        {
            name: torch.randn(batch_size, channels, *shape, generator=generator)
            for name, channels in {**BOX_BRANCHES, "hm": len(group)}.items()
        }
        for group in config.class_groups
    ]
    for head in heads:
        head["hm"] += bias
    return heads


def leaves_of(heads: list[HeadOutput]) -> list[Tensor]:
    return [value.requires_grad_() for head in heads for value in head.values()]


@pytest.mark.parametrize("config", [SMALL, TWO_HEADS], ids=["nuscenes", "two heads"])
@settings(max_examples=60, deadline=None)
@given(rows=samples, max_objects=st.sampled_from([3, 500]))
def test_targets(config: NetworkConfig, rows: list[list[list[float]]], max_objects: int) -> None:
    gt_boxes = padded(rows)
    ours = assign_targets(gt_boxes, config, max_objects=max_objects)
    theirs = plain_targets(gt_boxes, config, max_objects)
    for name, mine, other in zip(Targets._fields, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_radius_beyond_the_map() -> None:
    gt_boxes = padded([[[0.0, 0.0, 0.0, 900.0, 700.0, 2.0, 0.0, 0.0, 0.0, 1.0]]])
    ours, theirs = assign_targets(gt_boxes, SMALL, 3), plain_targets(gt_boxes, SMALL, 3)
    assert torch.equal(ours.heatmap, theirs.heatmap)
    assert int((ours.heatmap > 0).sum()) == SMALL.geometry.height * SMALL.geometry.width


@settings(max_examples=25, deadline=None)
@given(
    rows=samples,
    seed=st.integers(0, 99),
    loc_weight=st.sampled_from([0.25, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_gradients_of_the_loss(
    rows: list[list[list[float]]], seed: int, loc_weight: float, dtype: torch.dtype
) -> None:
    gt_boxes = padded(rows)
    targets = assign_targets(gt_boxes, TWO_HEADS)
    heads = [
        {name: value.to(dtype) for name, value in head.items()}
        for head in raw_heads(TWO_HEADS, len(rows), seed)
    ]
    leaves = leaves_of(heads)
    ours = center_loss(heads, targets, loc_weight=loc_weight)
    theirs = plain_loss(heads, targets, loc_weight)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    mine, others = (torch.autograd.grad(losses["loss"], leaves) for losses in (ours, theirs))
    for grad, other in zip(mine, others, strict=True):
        assert torch.equal(grad, other)


def test_a_head_that_is_nan_leaves_the_parts_of_the_others() -> None:
    heads = raw_heads(TWO_HEADS, 1, 0)
    heads[1]["hm"][0, 0, 3, 3] = NAN
    losses = center_loss(heads, assign_targets(torch.zeros(1, 0, 10), TWO_HEADS))
    broken = {name for name, value in losses.items() if not value.isfinite()}
    assert broken == {"loss", "hm_loss_head_1"}


def test_gradients_of_the_box_part_of_distillation() -> None:
    student, teacher = raw_heads(TWO_HEADS, 2, 0), raw_heads(TWO_HEADS, 2, 1)
    leaves = leaves_of(student)
    bev = torch.zeros(2, 1, *student[0]["hm"].shape[2:])
    parts = distillation_loss(
        Outputs(student, bev), Outputs(teacher, bev), DistillationConfig(box_weight=0.3), CODE_WEIGHTS
    )
    peaks = peaks_of(teacher)
    weighted = [
        plain_box_error(head, *(value[:, number] for value in peaks[1:]))
        @ torch.tensor(CODE_WEIGHTS)
        / peaks.mask[:, number].sum().clamp(min=1)
        for number, head in enumerate(student)
    ]
    expected = 0.3 * torch.stack(weighted).sum()
    torch.testing.assert_close(parts["distill_box"], expected)
    mine, others = (
        torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (parts["distill_box"], expected)
    )
    for grad, other in zip(mine, others, strict=True):
        assert (grad is None and other is None) or torch.equal(grad, other)


def some_maps(kind: str, seed: int) -> list[HeadOutput]:
    heads = raw_heads(TWO_HEADS, 2, seed, bias=-3.0)
    for head in heads:
        head["dim"] = head["dim"] * 0.3 + 0.5
        if kind == "ties":
            head["hm"] = head["hm"].round()
        elif kind == "nan":
            head["hm"][:, :, ::3] = NAN
        elif kind == "empty sample":
            head["hm"][0] = -9.0
        elif kind == "empty":
            head["hm"][:] = -9.0
    return heads


@pytest.mark.parametrize("kind", ["plain", "ties", "nan", "empty sample", "empty"])
@pytest.mark.parametrize(
    "post",
    [
        PostProcessing(),
        PostProcessing(max_objects_per_head=25, nms_pre=20, nms_post=6, nms_iou=0.05),
        PostProcessing(center_range=(-5.0, -4.0, -1.0, 9.0, 4.0, 0.5), nms_pre=15),
    ],
    ids=["default", "few", "narrow"],
)
def test_detections(kind: str, post: PostProcessing) -> None:
    heads = some_maps(kind, 0)
    expected = plain_decode(heads, TWO_HEADS, post)
    found = decode(heads, TWO_HEADS, post)
    with as_on_gpu():
        as_there = decode(heads, TWO_HEADS, post)
    for ours, there, theirs in zip(found, as_there, expected, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert torch.equal(getattr(there, name), getattr(theirs, name)), name


@pytest.mark.parametrize("links", [1, 16, 17, 40])
def test_chains_of_suppressions_longer_than_the_rounds(links: int) -> None:
    """Each box overlaps the next one only: every second box stays."""
    boxes = torch.zeros(links + 1, 7)
    boxes[:, 0] = torch.arange(links + 1) * 0.6
    boxes[:, 3:6] = 1
    with as_on_gpu():
        kept = rotated_nms(boxes, torch.linspace(1, 0.1, links + 1), 0.2)
    assert kept.tolist() == list(range(0, links + 1, 2))


def gt_boxes_of(batch_size: int) -> Tensor:
    gt_boxes = torch.rand((batch_size, 20, 10), generator=torch.Generator().manual_seed(0))
    gt_boxes[..., :2] = gt_boxes[..., :2] * 20 - 10
    gt_boxes[..., 3:5] *= 5
    gt_boxes[..., 9] = torch.arange(20) % 11
    return gt_boxes


def waits_of(count: Count) -> Counter[str]:
    waits: Counter[str] = Counter()
    for (operator, _), number in count.waits.items():
        waits[operator] += number
    return waits


@pytest.mark.parametrize("batch_size", [1, 3])
def test_operators_and_waits_of_a_step(batch_size: int) -> None:
    gt_boxes, heads = gt_boxes_of(batch_size), raw_heads(SMALL, batch_size, 0)
    leaves = leaves_of(heads)
    bev = torch.zeros(batch_size, 1, *heads[0]["hm"].shape[2:])
    pair = Outputs(heads, bev), Outputs(raw_heads(SMALL, batch_size, 1), bev)
    for _ in range(2):  # constants are made in the first
        with as_on_gpu():
            with counting_operators() as of_targets:
                targets = assign_targets(gt_boxes, SMALL)
            with counting_operators() as of_loss:
                loss = center_loss(heads, targets)["loss"]
            with counting_operators() as of_gradient:
                torch.autograd.grad(loss, leaves)
            with counting_operators() as of_distillation:
                distillation_loss(*pair, DistillationConfig(), CODE_WEIGHTS)
    assert waits_of(of_targets) == {"aten::_local_scalar_dense": 1}
    assert of_targets.num_operators <= 70
    assert of_loss.num_waits == of_gradient.num_waits == of_distillation.num_waits == 0
    assert of_loss.num_operators <= 37
    assert of_gradient.num_operators <= 45


@pytest.mark.parametrize("batch_size", [1, 3])
def test_waits_of_decoding(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, read = raw_heads(SMALL, batch_size, 0), []
    plain = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        read.append(tensor)
        return plain(tensor)

    monkeypatch.setattr(Tensor, "tolist", tolist)  # on a GPU one wait, whatever its size
    for _ in range(2):
        read.clear()
        with as_on_gpu(), counting_operators() as count:
            decode(heads, SMALL, PostProcessing())
    assert waits_of(count) == {"aten::nonzero": 2}
    assert len(read) == 1
    assert count.num_operators <= 230


def test_what_inference_made_serves_training() -> None:
    config = replace(TWO_HEADS, point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0))  # no other test's
    gt_boxes, heads = gt_boxes_of(1), raw_heads(config, 1, 0)
    with torch.inference_mode():
        center_loss(heads, assign_targets(gt_boxes, config))
        decode(heads, config, PostProcessing())
    leaves = leaves_of(heads)
    grads = torch.autograd.grad(center_loss(heads, assign_targets(gt_boxes, config))["loss"], leaves)
    assert all(grad.isfinite().all() for grad in grads)


class Answers:
    """A network that knows its raw outputs."""

    config = TWO_HEADS

    def __call__(self, *inputs: Any) -> list[HeadOutput]:
        return raw_heads(TWO_HEADS, 2, 0)


def test_targets_that_come_with_the_batch() -> None:
    gt_boxes = gt_boxes_of(2)
    batch: dict[str, Any] = {"voxel_features": None, "voxel_coords": None, "batch_size": 2}
    moved = move_data_to_device({"targets": assign_targets(gt_boxes, TWO_HEADS)}, torch.device("cpu"))
    assert isinstance(moved["targets"], Targets)
    network: Any = Answers()
    made, given = (
        training_losses(network, {**batch, **more}, CODE_WEIGHTS, 0.25)
        for more in ({"gt_boxes": gt_boxes}, moved)
    )
    assert {name: float(value) for name, value in made.items()} == {k: float(v) for k, v in given.items()}


@pytest.mark.cuda
def test_a_gpu_is_waited_for_three_times_by_decoding_and_never_by_the_loss() -> None:
    heads = [{name: value.cuda() for name, value in head.items()} for head in some_maps("ties", 0)]
    gt_boxes, leaves = gt_boxes_of(2), leaves_of(heads)
    targets = move_data_to_device(assign_targets(gt_boxes, TWO_HEADS), torch.device("cuda"))
    for mode in ("default", "error"):  # constants are made in the first
        torch.cuda.set_sync_debug_mode(mode)
        try:
            grads = torch.autograd.grad(center_loss(heads, targets)["loss"], leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    on_cpu = [{name: value.detach().cpu() for name, value in head.items()} for head in heads]
    own = torch.autograd.grad(
        center_loss(on_cpu, assign_targets(gt_boxes, TWO_HEADS))["loss"], leaves_of(on_cpu)
    )
    for grad, other in zip(grads, own, strict=True):
        torch.testing.assert_close(grad.cpu(), other)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as warned:
            found = decode(heads, TWO_HEADS, PostProcessing())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) <= 3
    with torch.no_grad():
        expected = decode(on_cpu, TWO_HEADS, PostProcessing())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.labels.cpu(), theirs.labels)
        torch.testing.assert_close(ours.boxes.cpu(), theirs.boxes)
