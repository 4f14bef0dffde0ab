"""Which points lie in which boxes, and which boxes overlap in bird's-eye view.

Shape letters: N M boxes, P points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.boxes import YAW, Float, Float64

_CELL_M = 1.0
_MARGIN_M = 1e-3
"""By which the search for points near a box reaches further than the box, against rounding in float32."""

Points = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


def points_in_boxes(points: Points, boxes: Float64) -> list[Rows]:
    """Finds the points in each box, its surface included, decided in float64.

    A map of the cells that boxes touch rules out nearly all points first.

    Args:
        points: (P, >= 3) x, y, z first.
        boxes: (N, >= 7) box rows.

    Returns:
        For each box the rows of its points, ascending; a point in two boxes is in both lists.
    """
    if not len(boxes):
        return []
    near = np.flatnonzero(_near_boxes(points, boxes))
    candidates = points[near, :3].astype(np.float64)
    return [near[_is_in_box(candidates, box)] for box in boxes]


def _near_boxes(points: Points, boxes: Float64) -> Mask:
    """Whether each point (P,) lies in a cell that the bird's-eye view of a box touches."""
    cos, sin = np.abs(np.cos(boxes[:, YAW])), np.abs(np.sin(boxes[:, YAW]))
    length, width = boxes[:, 3], boxes[:, 4]
    reach = np.stack([cos * length + sin * width, sin * length + cos * width], axis=1) / 2 + _MARGIN_M
    origin = (boxes[:, :2] - reach).min(axis=0)
    first = np.floor((boxes[:, :2] - reach - origin) / _CELL_M).astype(np.int64)
    last = np.floor((boxes[:, :2] + reach - origin) / _CELL_M).astype(np.int64)
    width_cells, height_cells = last.max(axis=0) + 1
    # A border of free cells, into which everything outside is clipped.
    is_near = np.zeros((width_cells + 2, height_cells + 2), dtype=np.bool_)
    for (x_first, y_first), (x_last, y_last) in zip(first + 1, last + 1, strict=True):
        is_near[x_first : x_last + 1, y_first : y_last + 1] = True
    x, y = (
        np.clip((points[:, axis] - np.float32(origin[axis])) / np.float32(_CELL_M) + 1, 0, cells + 1)
        for axis, cells in ((0, width_cells), (1, height_cells))
    )
    near: Mask = is_near[x.astype(np.int32), y.astype(np.int32)]
    return near


def _is_in_box(xyz: Float64, box: Float64) -> Mask:
    offset = xyz - box[:3]
    cos, sin = np.cos(box[YAW]), np.sin(box[YAW])
    inside: Mask = (
        (np.abs(offset[:, 0] * cos + offset[:, 1] * sin) <= box[3] / 2)
        & (np.abs(offset[:, 1] * cos - offset[:, 0] * sin) <= box[4] / 2)
        & (np.abs(offset[:, 2]) <= box[5] / 2)
    )
    return inside


def boxes_overlap(first: Float, second: Float) -> Mask:
    """Whether the rectangles of boxes in bird's-eye view share an area, so that their IoU is above 0.

    Two convex shapes have disjoint interiors exactly if the direction of one of their sides separates them.

    Args:
        first: (N, >= 7) box rows of positive length and width.
        second: (M, >= 7) likewise.

    Returns:
        (N, M).
    """
    turn = first[:, None, YAW] - second[None, :, YAW]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    offset = second[None, :, :2] - first[:, None, :2]
    length_a, width_a = first[:, 3, None] / 2, first[:, 4, None] / 2
    length_b, width_b = second[None, :, 3] / 2, second[None, :, 4] / 2
    along_a, across_a = _components(offset, first[:, None, YAW])
    along_b, across_b = _components(offset, second[None, :, YAW])
    overlap: Mask = (
        (along_a < length_a + length_b * cos + width_b * sin)
        & (across_a < width_a + length_b * sin + width_b * cos)
        & (along_b < length_b + length_a * cos + width_a * sin)
        & (across_b < width_b + length_a * sin + width_a * cos)
    )
    return overlap


def _components(offset: Float, yaw: Float) -> tuple[Float, Float]:
    """Lengths of offsets (N, M, 2) along and across a direction."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    x, y = offset[..., 0], offset[..., 1]
    return np.abs(x * cos + y * sin), np.abs(y * cos - x * sin)
