"""Targets of the centre head: heat maps, box codes and their cells.

Letters: B batch, M boxes given per sample, G heads (groups of classes), K slots of a head and sample, C
classes of all heads, H W rows and columns of the map, N Gaussians, E edge of a window. The rules are
OpenPCDet's; where it is odd the choice made here is:

* a box whose centre is outside the range is not dropped but clamped to the border cell (its box code then
  points from there); the data pipeline has removed such boxes before;
* OpenPCDet renumbers the class column of `gt_boxes` in place, head after head; here the input is left
  alone, so that any order of class groups is right;
* a box of no length or width is skipped and leaves its slot empty; so is one with a non-finite pose or size,
  where OpenPCDet would fail;
* a velocity of NaN ("unknown") stays NaN in the code; the loss leaves it out.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cpq_train.models.config import BevGeometry, NetworkConfig
from cpq_train.models.constants import constant

BOX_CODE_SIZE = 10
"""Offset x, y (cells), z (m), log length, width, height (m), cos, sin of yaw, velocity x, y (m/s)."""

_NO_RADIUS = -1.0
"""Of a box without a target: draws nothing."""


class Targets(NamedTuple):
    """What the heads should say; a tuple of tensors, so that it travels to a device with its batch.

    Attributes:
        heatmap: (B, C, H, W) float32, 1 exactly at the cell of an object; classes as the heads list them.
        boxes: box codes, (B, G, K, 10) float32, see `BOX_CODE_SIZE`.
        indices: cell y * W + x of each slot, (B, G, K) int64.
        known: numbers of the box codes that count, (B, G, K, 10) bool: those of objects, but for an unknown
            velocity.
    """

    heatmap: Tensor
    boxes: Tensor
    indices: Tensor
    known: Tensor

    @property
    def mask(self) -> Tensor:
        """Slots that hold an object, (B, G, K) bool."""
        return self.known[..., 0]


class _Placed(NamedTuple):
    """Where the target of each box goes, (B, M) each.

    Attributes:
        has_target: whether it has one.
        slot: its slot, counted over samples and heads; the one behind the last where it has no target.
        first_cell: where the map of its class begins in the heat map.
    """

    has_target: Tensor
    slot: Tensor
    first_cell: Tensor


def assign_targets(
    gt_boxes_BM10: Tensor,
    config: NetworkConfig,
    max_objects: int = 500,
    gaussian_overlap: float = 0.1,
    min_radius: int = 2,
) -> Targets:
    """Turns boxes into the targets of every head.

    All boxes are taken alike, whether they have a target or not, so that no size depends on what they say:
    the host reads the largest radius and nothing else.

    Args:
        gt_boxes_BM10: x, y, z, length, width, height (m), yaw (rad), velocity x, y (m/s) and label; the label
            is the class id plus 1, and 0 in padding. Left unchanged.
        config: gives the class ids by head, and the map.
        max_objects: slots per head and sample (K); later boxes are dropped.
        gaussian_overlap: IoU that a box shifted within the radius still has with the true one.
        min_radius: smallest radius of a Gaussian, cells.

    Returns:
        Targets, on the device of the boxes.
    """
    geometry, batch_size = config.geometry, gt_boxes_BM10.shape[0]
    placed = _place(gt_boxes_BM10, config, max_objects)
    in_cells_BM5 = _in_cells(gt_boxes_BM10, geometry)
    center_BM2 = _clamped_to_map(in_cells_BM5[..., :2], geometry)
    cell_BM2 = center_BM2.long()

    shape = (batch_size, len(config.class_groups), max_objects)
    num_slots = shape[0] * shape[1] * shape[2]
    # One slot more takes the boxes without a target, and is cut off.
    boxes = gt_boxes_BM10.new_zeros((num_slots + 1, BOX_CODE_SIZE))
    indices = cell_BM2.new_zeros(num_slots + 1)
    known = torch.zeros_like(boxes, dtype=torch.bool)
    codes_BMC = _box_codes(gt_boxes_BM10, center_BM2)
    boxes[placed.slot] = codes_BMC
    indices[placed.slot] = cell_BM2[..., 1] * geometry.width + cell_BM2[..., 0]
    known[placed.slot] = codes_BMC == codes_BMC  # which NaN does not

    radius_BM = gaussian_radius(in_cells_BM5[..., 3], in_cells_BM5[..., 4], gaussian_overlap)
    no_radius = constant((_NO_RADIUS,), radius_BM.device, radius_BM.dtype)
    radius_BM = torch.where(placed.has_target, radius_BM.trunc().clamp(min=min_radius), no_radius)
    num_classes = sum(map(len, config.class_groups))
    heatmap = gt_boxes_BM10.new_zeros((batch_size, num_classes, geometry.height, geometry.width))
    draw_gaussians(heatmap, placed.first_cell.flatten(), cell_BM2.flatten(0, 1), radius_BM.flatten())
    slots = (x[:-1].unflatten(0, shape) for x in (boxes, indices, known))
    return Targets(heatmap, *slots)


def gaussian_radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    """Radius within which a box keeps an overlap with the true one (CornerNet, as published).

    The three cases are: one corner outside and one inside, both inside, both outside. The published code
    divides by 2 where the quadratic formula has 2a; networks are trained with it, so it stays.

    Args:
        length: box lengths, cells.
        width: box widths, cells.
        overlap: least IoU.

    Returns:
        Radii, cells, not rounded.
    """
    four_a = (4.0, 16.0, 16 * overlap)
    b_by_total = (1.0, 2.0, -2 * overlap)
    c_by_area = (1 - overlap, 1 - overlap, overlap - 1)
    c_divisor = (1 + overlap, 1.0, 1.0)
    numbers = constant((four_a, b_by_total, c_by_area, c_divisor), length.device, length.dtype)
    four_a_3, b_by_total_3, c_by_area_3, c_divisor_3 = numbers.unbind()
    b = (length + width)[..., None] * b_by_total_3
    c = (length * width)[..., None] * c_by_area_3 / c_divisor_3
    return ((b + torch.sqrt(b**2 - four_a_3 * c)) / 2).amin(-1)


def draw_gaussians(heatmap: Tensor, first_cell_N: Tensor, cells_N2: Tensor, radius_N: Tensor) -> None:
    """Merges Gaussians into heat maps by maximum, in place.

    A Gaussian is cut to the square of its radius and has a sixth of the square's edge as its deviation.
    All are drawn into windows of one size, the largest square's: a cell outside its own square, or outside
    the map, gets a 0, which changes no maximum.

    Args:
        heatmap: (..., H, W) float, 0 or more.
        first_cell_N: where in it the map of each Gaussian begins, counted in cells, (N,) int64.
        cells_N2: x, y of each centre inside the map, (N, 2) int64.
        radius_N: radius, whole cells, (N,) floating point; one below 0 draws nothing.
    """
    height, width = heatmap.shape[-2:]
    largest = int(radius_N.max()) if len(radius_N) else 0  # the host waits here, and nowhere else
    window = _window(max(0, min(largest, max(height, width))), heatmap.device)
    position_N2E = cells_N2[..., None] + window.offset_E
    bounds = constant((((0,), (0,)), ((width - 1,), (height - 1,))), heatmap.device, torch.int64)
    inside_N2E = position_N2E.clamp(bounds[0], bounds[1])
    is_drawn_N2E = (window.distance_E <= radius_N[:, None, None]) & (position_N2E == inside_N2E)
    is_drawn_NEE = is_drawn_N2E[:, 1, :, None] & is_drawn_N2E[:, 0, None]

    variance_N = ((radius_N.double() + 0.5) / 3) ** 2
    value_NEE = torch.exp(window.minus_half_square_EE / variance_N[:, None, None]) * is_drawn_NEE
    row_NE = inside_N2E[:, 1] * width + first_cell_N[:, None]
    flat_NEE = row_NE[..., None] + inside_N2E[:, 0, None]
    value = value_NEE.to(heatmap.dtype).flatten()
    heatmap.view(-1).scatter_reduce_(0, flat_NEE.flatten(), value, "amax")


class _Window(NamedTuple):
    """Where the cells of a window are from its centre: along an edge, int64, and in the plane, float64."""

    offset_E: Tensor
    distance_E: Tensor
    minus_half_square_EE: Tensor


@cache
def _window(radius: int, device: torch.device) -> _Window:
    with torch.inference_mode(False):  # see `constant`
        offset_E = torch.arange(-radius, radius + 1, device=device)
        square_E = offset_E.double() ** 2
        return _Window(offset_E, offset_E.abs(), -(square_E[:, None] + square_E) / 2)


def _place(gt_boxes_BM10: Tensor, config: NetworkConfig, max_objects: int) -> _Placed:
    """Finds the slot and the map of each box; boxes of no head, size or slot have no target."""
    batch_size, device = len(gt_boxes_BM10), gt_boxes_BM10.device
    num_heads = len(config.class_groups)
    by_label, by_sample = _places(config, max_objects, batch_size)
    labels_BM = gt_boxes_BM10[..., 9].long()
    of_box = constant(by_label, device, torch.int64)[labels_BM] + constant(by_sample, device, torch.int64)
    head_BM, first_slot_BM, first_cell_BM, last_rank_BM = of_box.unbind(-1)
    heads_G1 = constant(tuple((head,) for head in range(num_heads + 1)), device, torch.int64)
    # A box that is skipped below still takes its slot.
    rank_BM = (head_BM[:, None] == heads_G1).cumsum(2).gather(1, head_BM[:, None])[:, 0]

    pose_and_size = gt_boxes_BM10[..., :7]
    above = constant((-torch.inf,) * 3 + (0.0,) * 2 + (-torch.inf,) * 2, device, gt_boxes_BM10.dtype)
    is_usable_BM = ((pose_and_size > above) & (pose_and_size < torch.inf)).all(-1)
    has_target_BM = is_usable_BM & (rank_BM <= last_rank_BM)
    no_slot = constant((batch_size * num_heads * max_objects,), device, torch.int64)
    slot_BM = torch.where(has_target_BM, first_slot_BM + rank_BM, no_slot)
    return _Placed(has_target_BM, slot_BM, first_cell_BM)


_Numbers = tuple[tuple[int, int, int, int], ...]


def _places(
    config: NetworkConfig, max_objects: int, batch_size: int
) -> tuple[_Numbers, tuple[tuple[tuple[int, int, int, int]], ...]]:
    """Head, slot before its first one, first cell of the map, and last rank that has a slot, by label.

    And what a sample adds to them, (B, 1, 4). Labels of no head have one behind the last, without slots.
    """
    num_heads, num_cells = len(config.class_groups), config.geometry.height * config.geometry.width
    by_label = [(num_heads, 0, 0, 0)] * (len(config.class_names) + 1)
    owners = [(head, class_id) for head, group in enumerate(config.class_ids) for class_id in group]
    for channel, (head, class_id) in enumerate(owners):
        by_label[class_id + 1] = (head, head * max_objects - 1, channel * num_cells, max_objects)
    sizes = (num_heads * max_objects, len(owners) * num_cells)
    by_sample = tuple(((0, sample * sizes[0], sample * sizes[1], 0),) for sample in range(batch_size))
    return tuple(by_label), by_sample


def _in_cells(boxes_BM10: Tensor, geometry: BevGeometry) -> Tensor:
    """Place x, y on the map, z (of no use), length and width, in cells, (B, M, 5)."""
    origin = (*geometry.point_cloud_range[:2], 0.0, 0.0, 0.0)
    voxel_m = (*geometry.voxel_size[:2], 1.0, *geometry.voxel_size[:2])
    numbers = constant((origin, voxel_m), boxes_BM10.device, boxes_BM10.dtype)
    # Divided twice, as published: one division by the cell size rounds differently at cell borders.
    return (boxes_BM10[..., :5] - numbers[0]) / numbers[1] / geometry.stride


def _clamped_to_map(place_BM2: Tensor, geometry: BevGeometry) -> Tensor:
    limits = ((0.0, 0.0), (geometry.width - 0.5, geometry.height - 0.5))
    low, high = constant(limits, place_BM2.device, place_BM2.dtype).unbind()
    return place_BM2.clamp(low, high)


def _box_codes(boxes_BM10: Tensor, center_BM2: Tensor) -> Tensor:
    yaw_BM1 = boxes_BM10[..., 6:7]
    parts = (
        center_BM2 - center_BM2.floor(),
        boxes_BM10[..., 2:3],
        boxes_BM10[..., 3:6].log(),
        yaw_BM1.cos(),
        yaw_BM1.sin(),
        boxes_BM10[..., 7:9],
    )
    return torch.cat(parts, dim=-1)
