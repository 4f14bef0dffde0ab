"""Targets of the centre head: heat maps, box codes and their cells.

Letters: B batch, M boxes given per sample, N boxes drawn, K slots per sample, C classes of a head, H W rows
and columns of the map. The rules are OpenPCDet's; where it is odd the choice made here is:

* a box whose centre is outside the range is not dropped but clamped to the border cell (its box code then
  points from there); the data pipeline has removed such boxes before;
* OpenPCDet renumbers the class column of `gt_boxes` in place, head after head; here the input is left
  alone, so that any order of class groups is right;
* a box of no length or width is skipped and leaves its slot empty; so is one with a non-finite pose or size,
  where OpenPCDet would fail;
* a velocity of NaN ("unknown") stays NaN in the code; the loss leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpq_train.models.config import BevGeometry, NetworkConfig

BOX_CODE_SIZE = 10
"""Offset x, y (cells), z (m), log length, width, height (m), cos, sin of yaw, velocity x, y (m/s)."""


@dataclass(frozen=True)
class HeadTargets:
    """What one head should say.

    Attributes:
        heatmap: (B, C, H, W) float32, 1 exactly at the cell of an object.
        boxes: box codes, (B, K, 10) float32, see `BOX_CODE_SIZE`.
        indices: cell y * W + x of each slot, (B, K) int64.
        mask: slots that hold an object, (B, K) bool.
    """

    heatmap: Tensor
    boxes: Tensor
    indices: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Selected:
    """The N boxes that get a target, as flat columns."""

    boxes: Tensor
    sample: Tensor
    head: Tensor
    slot: Tensor
    channel: Tensor


def assign_targets(
    gt_boxes_BM10: Tensor,
    config: NetworkConfig,
    max_objects: int = 500,
    gaussian_overlap: float = 0.1,
    min_radius: int = 2,
) -> list[HeadTargets]:
    """Turns boxes into the targets of every head.

    Args:
        gt_boxes_BM10: x, y, z, length, width, height (m), yaw (rad), velocity x, y (m/s) and label; the label
            is the class id plus 1, and 0 in padding. Left unchanged.
        config: gives the class ids by head, and the map.
        max_objects: slots per head and sample (K); later boxes are dropped.
        gaussian_overlap: IoU that a box shifted within the radius still has with the true one.
        min_radius: smallest radius of a Gaussian, cells.

    Returns:
        Targets by head, on the device of the boxes.
    """
    geometry, batch_size = config.geometry, gt_boxes_BM10.shape[0]
    selected = _select(gt_boxes_BM10, config, max_objects)
    cells_N2, indices_N = _cells(selected.boxes, geometry)

    group_sizes = [len(group) for group in config.class_groups]
    shape = (len(group_sizes), batch_size, max_objects)
    boxes = gt_boxes_BM10.new_zeros((*shape, BOX_CODE_SIZE))
    indices = indices_N.new_zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool, device=gt_boxes_BM10.device)
    where = (selected.head, selected.sample, selected.slot)
    boxes[where] = _box_codes(selected.boxes, cells_N2)
    indices[where] = indices_N
    mask[where] = True

    heatmap = gt_boxes_BM10.new_zeros((batch_size, sum(group_sizes), geometry.height, geometry.width))
    voxel_m = selected.boxes.new_tensor(geometry.voxel_size[:2])
    size_N2 = selected.boxes[:, 3:5] / voxel_m / geometry.stride
    radius_N = gaussian_radius(size_N2[:, 0], size_N2[:, 1], gaussian_overlap).long().clamp(min=min_radius)
    draw_gaussians(heatmap, selected.sample, selected.channel, cells_N2.long(), radius_N)
    maps = heatmap.split(group_sizes, dim=1)
    return [HeadTargets(*target) for target in zip(maps, boxes, indices, mask, strict=True)]


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
    total, area = length + width, length * width
    cases = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * total, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * total, (overlap - 1) * area),
    )
    radii = [(b + torch.sqrt(b**2 - 4 * a * c)) / 2 for a, b, c in cases]
    return torch.minimum(torch.minimum(radii[0], radii[1]), radii[2])


def draw_gaussians(
    heatmap: Tensor, sample_N: Tensor, channel_N: Tensor, cells_N2: Tensor, radius_N: Tensor
) -> None:
    """Merges Gaussians into heat maps by maximum, in place.

    A Gaussian is cut to the square of its radius and has a sixth of the square's edge as its deviation.

    Args:
        heatmap: (B, C, H, W) float.
        sample_N: sample of each Gaussian, (N,) int64.
        channel_N: channel of each Gaussian, (N,) int64.
        cells_N2: x, y of each centre inside the map, (N, 2) int64.
        radius_N: radius, cells, (N,) int64.
    """
    _, num_channels, height, width = heatmap.shape
    edge_N = 2 * radius_N + 1
    num_cells_N = edge_N**2
    owner = torch.repeat_interleave(num_cells_N)  # one entry for each cell of each square
    within = torch.arange(len(owner), device=owner.device) - (num_cells_N.cumsum(0) - num_cells_N)[owner]
    dx = within % edge_N[owner] - radius_N[owner]
    dy = within // edge_N[owner] - radius_N[owner]
    deviation = edge_N.double() / 6
    value = torch.exp(-(dx**2 + dy**2) / (2 * deviation[owner] ** 2)).to(heatmap.dtype)

    x, y = cells_N2[owner, 0] + dx, cells_N2[owner, 1] + dy
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    flat = ((sample_N[owner] * num_channels + channel_N[owner]) * height + y) * width + x
    heatmap.view(-1).scatter_reduce_(0, flat[inside], value[inside], "amax")


def _select(gt_boxes_BM10: Tensor, config: NetworkConfig, max_objects: int) -> _Selected:
    """Finds head, slot and heat-map channel of each box; boxes of no head, size or slot drop out."""
    channel_of_label, head_of_label = _label_tables(config, gt_boxes_BM10.device)
    labels_BM = gt_boxes_BM10[..., 9].long()
    head_BM = head_of_label[labels_BM]
    in_head = head_BM == torch.arange(len(config.class_groups), device=head_BM.device)[:, None, None]
    # A box that is skipped below still takes its slot.
    slot_BM = (in_head.cumsum(2) - 1).clamp(min=0).gather(0, head_BM.clamp(min=0)[None])[0]
    usable_BM = (gt_boxes_BM10[..., 3:5] > 0).all(-1) & gt_boxes_BM10[..., :7].isfinite().all(-1)
    sample, row = ((head_BM >= 0) & (slot_BM < max_objects) & usable_BM).nonzero(as_tuple=True)
    return _Selected(
        boxes=gt_boxes_BM10[sample, row],
        sample=sample,
        head=head_BM[sample, row],
        slot=slot_BM[sample, row],
        channel=channel_of_label[labels_BM[sample, row]],
    )


def _label_tables(config: NetworkConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Heat-map channel (counted over all heads) and head of each label; head -1 for labels of no head."""
    channel = torch.zeros(len(config.class_names) + 1, dtype=torch.int64)
    head = torch.full_like(channel, -1)
    owners = [(index, class_id) for index, group in enumerate(config.class_ids) for class_id in group]
    for number, (index, class_id) in enumerate(owners):
        channel[class_id + 1] = number
        head[class_id + 1] = index
    return channel.to(device), head.to(device)


def _cells(boxes_N10: Tensor, geometry: BevGeometry) -> tuple[Tensor, Tensor]:
    """Centres in cells, (N, 2) float, clamped to the map; index y * W + x of their cells, (N,)."""
    origin = boxes_N10.new_tensor(geometry.point_cloud_range[:2])
    voxel_m = boxes_N10.new_tensor(geometry.voxel_size[:2])
    # Divided twice, as published: one division by the cell size rounds differently at cell borders.
    cells_N2 = (boxes_N10[:, :2] - origin) / voxel_m / geometry.stride
    limit = cells_N2.new_tensor([geometry.width - 0.5, geometry.height - 0.5])
    cells_N2 = torch.minimum(cells_N2.clamp(min=0), limit)
    cell_N2 = cells_N2.long()
    return cells_N2, cell_N2[:, 1] * geometry.width + cell_N2[:, 0]


def _box_codes(boxes_N10: Tensor, cells_N2: Tensor) -> Tensor:
    yaw_N1 = boxes_N10[:, 6:7]
    parts = (
        cells_N2 - cells_N2.floor(),
        boxes_N10[:, 2:3],
        boxes_N10[:, 3:6].log(),
        yaw_N1.cos(),
        yaw_N1.sin(),
        boxes_N10[:, 7:9],
    )
    return torch.cat(parts, dim=1)
