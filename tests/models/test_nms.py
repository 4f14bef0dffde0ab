"""Rotated IoU and NMS against slow, sequential references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpq_train.models import rotated_iou_bev, rotated_nms

Point = tuple[float, float]


def corners(box: list[float]) -> list[Point]:
    x, y, _, length, width, _, yaw = box[:7]
    cos, sin = math.cos(yaw), math.sin(yaw)
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return [
        (x + cos * a * length / 2 - sin * b * width / 2, y + sin * a * length / 2 + cos * b * width / 2)
        for a, b in signs
    ]


def area(polygon: list[Point]) -> float:
    return sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True)) / 2


def clipped(polygon: list[Point], start: Point, end: Point) -> list[Point]:
    """Sutherland-Hodgman: the part of a polygon left of a line."""

    def side(p: Point) -> float:
        return (end[0] - start[0]) * (p[1] - start[1]) - (end[1] - start[1]) * (p[0] - start[0])

    result = []
    for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        a, b = side(p), side(q)
        if a >= 0:
            result.append(p)
        if (a >= 0) != (b >= 0):
            t = a / (a - b)
            result.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1])))
    return result


def reference_iou(a: list[float], b: list[float]) -> float:
    polygon, window = corners(a), corners(b)
    for start, end in zip(window, window[1:] + window[:1], strict=True):
        polygon = clipped(polygon, start, end) if polygon else polygon
    shared = area(polygon) if polygon else 0.0
    return shared / (a[3] * a[4] + b[3] * b[4] - shared)


def reference_nms(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    iou = rotated_iou_bev(boxes, boxes)
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(iou[other, index] <= threshold for other in kept):
            kept.append(index)
    return kept


def random_boxes(num_boxes: int, spread_m: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand((num_boxes, 9), generator=generator, dtype=torch.float64)
    boxes[:, :2] = (boxes[:, :2] - 0.5) * spread_m
    boxes[:, 3:6] = boxes[:, 3:6] * 4 + 0.3
    boxes[:, 6] = (boxes[:, 6] - 0.5) * 8
    return boxes


# Right angles, equal edges and shared corners are where clipping goes wrong, so they are made likely.
coordinate = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-4, 4))
size = st.one_of(st.sampled_from([1.0, 2.0]), st.floats(0.1, 6))
angle = st.one_of(st.sampled_from([0.0, math.pi / 2, -math.pi / 2, math.pi, math.pi / 4]), st.floats(-7, 7))
box = st.tuples(coordinate, coordinate, st.just(0.0), size, size, st.just(1.0), angle).map(list)


@settings(max_examples=150, deadline=None)
@given(box, box)
def test_iou_equals_polygon_clipping(a: list[float], b: list[float]) -> None:
    both = torch.tensor([a, b], dtype=torch.float64)
    iou = rotated_iou_bev(both, both)
    assert iou[0, 1].item() == pytest.approx(reference_iou(a, b), abs=1e-7)
    assert iou[1, 0].item() == pytest.approx(iou[0, 1].item(), abs=1e-7)
    assert iou.diagonal().tolist() == pytest.approx([1, 1], abs=1e-9)


@pytest.mark.parametrize("spread_m", [2.0, 12.0, 60.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.7])
def test_nms_equals_the_sequential_algorithm(spread_m: float, threshold: float) -> None:
    for seed in range(3):
        boxes = random_boxes(120, spread_m, seed)
        scores = (
            torch.rand(120, generator=torch.Generator().manual_seed(seed)).mul(20).round() / 20
        )  # with ties
        assert rotated_nms(boxes, scores, threshold).tolist() == reference_nms(boxes, scores, threshold)


def test_groups_are_independent_and_cut_to_their_best() -> None:
    boxes = random_boxes(90, 10.0)
    scores = torch.rand(90, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(90) % 3 * 7
    expected: list[int] = []
    for group in (0, 7, 14):
        rows = (groups == group).nonzero()[:, 0]
        best = rows[scores[rows].argsort(descending=True)[:20]]
        expected += best[torch.tensor(reference_nms(boxes[best], scores[best], 0.2))][:5].tolist()
    assert rotated_nms(boxes, scores, 0.2, groups, max_pre=20, max_post=5).tolist() == expected


def test_a_long_chain_of_suppressions() -> None:
    """Each box overlaps the next one only: every second box stays."""
    boxes = torch.zeros(41, 7)
    boxes[:, 0] = torch.arange(41) * 0.6
    boxes[:, 3:6] = 1
    kept = rotated_nms(boxes, torch.linspace(1, 0.1, 41), 0.2)
    assert kept.tolist() == list(range(0, 41, 2))


def test_no_boxes_one_box_and_equal_boxes() -> None:
    one = torch.tensor([[0.0, 0, 0, 2, 1, 1, 0.3]])
    assert rotated_nms(one[:0], torch.zeros(0), 0.2).tolist() == []
    assert rotated_iou_bev(one[:0], one).shape == (0, 1)
    assert rotated_nms(one, torch.ones(1), 0.2).tolist() == [0]
    assert rotated_nms(one.expand(5, -1), torch.ones(5), 0.2).tolist() == [0]


@pytest.mark.cuda
def test_cuda_keeps_the_same_boxes() -> None:
    boxes = random_boxes(300, 20.0)
    scores = torch.rand(300)
    kept = rotated_nms(boxes.cuda(), scores.cuda(), 0.2)
    assert kept.tolist() == rotated_nms(boxes, scores, 0.2).tolist()
