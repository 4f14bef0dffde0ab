"""Intersection over union of rotated rectangles seen from above, in plain torch.

Letters: N M boxes, P pairs of boxes, 4 corners or edges. A box is a row that begins with x, y, z, length,
width, height (m), yaw (rad); length lies along the yaw. Areas are exact (float64), where OpenPCDet's kernel
has a margin of 1 cm in its corner test and so differs by up to 0.006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_train.models.constants import constant

_CORNERS = ((1.0, -1.0, -1.0, 1.0), (1.0, 1.0, -1.0, -1.0))
"""Of the corners, counter-clockwise, in half lengths and half widths."""

_TINY_M = 1e-9


def rotated_iou_bev(boxes_a_N7: Tensor, boxes_b_M7: Tensor) -> Tensor:
    """IoU of every box of one set with every box of another.

    Args:
        boxes_a_N7: boxes, (N, 7 or more).
        boxes_b_M7: boxes, (M, 7 or more).

    Returns:
        IoU in the bird's-eye view, (N, M) float64.
    """
    a, b = boxes_a_N7.double(), boxes_b_M7.double()
    row, column = circles_meet(a[:, None], b[None]).nonzero(as_tuple=True)
    iou_NM = a.new_zeros((len(a), len(b)))
    iou_NM[row, column] = pair_iou(a[row], b[column])
    return iou_NM


def circles_meet(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Whether the circles around two boxes meet: quick rejection before any exact intersection.

    Args:
        boxes_a: boxes, (..., 7 or more).
        boxes_b: boxes, broadcastable against `boxes_a`.

    Returns:
        Booleans of the broadcast shape.
    """
    reach = _circumradius(boxes_a) + _circumradius(boxes_b)
    dx, dy = boxes_a[..., 0] - boxes_b[..., 0], boxes_a[..., 1] - boxes_b[..., 1]
    # In place: with many boxes most of the time is spent on getting memory.
    return dx.square_().add_(dy.square_()) < reach.square_()


def pair_iou(boxes_a_P7: Tensor, boxes_b_P7: Tensor) -> Tensor:
    """IoU of boxes taken pair by pair.

    Args:
        boxes_a_P7: boxes, (P, 7 or more) float64.
        boxes_b_P7: boxes, (P, 7 or more) float64.

    Returns:
        IoU in the bird's-eye view, (P,).
    """
    shared = _intersection_area(boxes_a_P7, boxes_b_P7)
    union = boxes_a_P7[:, 3] * boxes_a_P7[:, 4] + boxes_b_P7[:, 3] * boxes_b_P7[:, 4] - shared
    return shared / union.clamp(min=_TINY_M**2)


def _circumradius(boxes: Tensor) -> Tensor:
    return torch.hypot(boxes[..., 3], boxes[..., 4]) / 2


def _intersection_area(boxes_a_P7: Tensor, boxes_b_P7: Tensor) -> Tensor:
    """Area that two rectangles share.

    In the frame of a, the area is the integral over a's length of the gap between the upper and the lower
    outline of b, both clamped to a's width. Along b's outline (counter-clockwise) that is minus the sum
    over its edges of the integral of the clamped height: no cases, and continuous where edges coincide.
    """
    x_P4, y_P4 = _corners_in_frame(boxes_b_P7, boxes_a_P7)
    half_length_P1, half_width_P1 = boxes_a_P7[:, 3:4] / 2, boxes_a_P7[:, 4:5] / 2
    next_x_P4, next_y_P4 = x_P4.roll(-1, 1), y_P4.roll(-1, 1)
    run, rise = next_x_P4 - x_P4, next_y_P4 - y_P4
    slope = torch.where(run.abs() > _TINY_M, rise / run, 0.0)  # an upright edge spans no area
    start = x_P4.clamp(-half_length_P1, half_length_P1)
    end = next_x_P4.clamp(-half_length_P1, half_length_P1)
    height = _mean_clamped(y_P4 + slope * (start - x_P4), y_P4 + slope * (end - x_P4), half_width_P1)
    return -((end - start) * height).sum(1).clamp(max=0)


def _corners_in_frame(boxes_P7: Tensor, frame_P7: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of boxes, counter-clockwise, in the frame of other boxes: x and y, each (P, 4)."""
    dx, dy = boxes_P7[:, 0] - frame_P7[:, 0], boxes_P7[:, 1] - frame_P7[:, 1]
    cos, sin = frame_P7[:, 6].cos(), frame_P7[:, 6].sin()
    center_x, center_y = cos * dx + sin * dy, cos * dy - sin * dx
    yaw = boxes_P7[:, 6] - frame_P7[:, 6]
    signs_2_4 = constant(_CORNERS, boxes_P7.device, boxes_P7.dtype)
    along, across = signs_2_4[0] * boxes_P7[:, 3:4] / 2, signs_2_4[1] * boxes_P7[:, 4:5] / 2
    cos, sin = yaw.cos()[:, None], yaw.sin()[:, None]
    return center_x[:, None] + cos * along - sin * across, center_y[:, None] + sin * along + cos * across


def _mean_clamped(start: Tensor, end: Tensor, limit: Tensor) -> Tensor:
    """Mean of clamp(y, -limit, limit) while y runs evenly from start to end."""
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    span = high - low
    inner_low, inner_high = low.clamp(-limit, limit), high.clamp(-limit, limit)
    middle = (inner_low + inner_high) / 2
    below = (-limit - low).clamp(min=0).minimum(span)
    above = (high - limit).clamp(min=0).minimum(span)
    mean = ((above - below) * limit + (inner_high - inner_low) * middle) / span
    return torch.where(span > _TINY_M, mean, middle)
