"""The rules of targets, losses and decoding once more, box by box and head by head: slow and plain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from cpq_train.models import (
    BOX_BRANCHES,
    CODE_WEIGHTS,
    Detections,
    HeadOutput,
    NetworkConfig,
    PostProcessing,
    Targets,
    rotated_iou_bev,
)


def plain_targets(gt_boxes: Tensor, config: NetworkConfig, max_objects: int, min_radius: int = 2) -> Targets:
    """As `assign_targets`, at an overlap of 0.1."""
    geometry, num_heads = config.geometry, len(config.class_groups)
    names = [name for group in config.class_groups for name in group]
    heatmap = torch.zeros(len(gt_boxes), len(names), geometry.height, geometry.width)
    boxes = torch.zeros(len(gt_boxes), num_heads, max_objects, 10)
    indices = torch.zeros(boxes.shape[:3], dtype=torch.int64)
    known = torch.zeros(boxes.shape, dtype=torch.bool)
    for sample, head, slot, box in _placed(gt_boxes, config, max_objects):
        voxel_m = torch.tensor(config.voxel_size[:2])
        place = (box[:2] - torch.tensor(config.point_cloud_range[:2])) / voxel_m / geometry.stride
        place = place.clamp(min=0)
        place = torch.minimum(place, torch.tensor([geometry.width - 0.5, geometry.height - 0.5]))
        x, y = place.long().tolist()
        code = (place - place.floor(), box[2:3], box[3:6].log(), box[6:7].cos(), box[6:7].sin(), box[7:9])
        boxes[sample, head, slot] = torch.cat(code)
        indices[sample, head, slot] = y * geometry.width + x
        known[sample, head, slot] = ~torch.cat(code).isnan()
        length, width = box[3:5] / voxel_m / geometry.stride
        radius = max(int(_radius(length, width, 0.1)), min_radius)
        channel = names.index(config.class_names[int(box[9]) - 1])
        _draw(heatmap[sample, channel], x, y, radius)
    return Targets(heatmap, boxes, indices, known)


def _placed(
    gt_boxes: Tensor, config: NetworkConfig, max_objects: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Sample, head, slot and row of each box that has a target."""
    for sample, rows in enumerate(gt_boxes):
        taken = [0] * len(config.class_groups)
        for row in rows:
            for head, class_ids in enumerate(config.class_ids):
                if int(row[9]) - 1 in class_ids:
                    slot = taken[head]
                    taken[head] += 1
                    is_usable = all(map(isfinite, row[:7])) and bool((row[3:5] > 0).all())
                    if slot < max_objects and is_usable:
                        yield sample, head, slot, row


def _radius(length: Tensor, width: Tensor, overlap: float) -> Tensor:
    total, area = length + width, length * width
    cases = (
        (1.0, total, area * (1 - overlap) / (1 + overlap)),
        (4.0, 2 * total, (1 - overlap) * area),
        (4 * overlap, -2 * overlap * total, (overlap - 1) * area),
    )
    return torch.stack([(b + torch.sqrt(b**2 - 4 * a * c)) / 2 for a, b, c in cases]).min()


def _draw(heatmap: Tensor, x: int, y: int, radius: int) -> None:
    deviation = (2 * radius + 1) / 6
    rows, columns = (torch.arange(size) for size in heatmap.shape)
    square = (rows[:, None] - y) ** 2 + (columns - x) ** 2
    gaussian = torch.exp(-square.double() / (2 * deviation**2)).float()
    is_near = ((rows[:, None] - y).abs() <= radius) & ((columns - x).abs() <= radius)
    heatmap[:] = torch.where(is_near, torch.maximum(heatmap, gaussian), heatmap)


def plain_loss(heads: Sequence[HeadOutput], targets: Targets, loc_weight: float = 0.25) -> dict[str, Tensor]:
    """As `center_loss`, in one process."""
    losses: dict[str, Tensor] = {}
    heatmaps = targets.heatmap.split([head["hm"].shape[1] for head in heads], dim=1)
    for number, (head, heatmap) in enumerate(zip(heads, heatmaps, strict=True)):
        probability = head["hm"].float().sigmoid().clamp(1e-4, 1 - 1e-4)
        at_peaks = probability.log() * (1 - probability) ** 2
        elsewhere = (1 - probability).log() * probability**2 * (1 - heatmap) ** 4
        total = -torch.where(heatmap == 1, at_peaks, elsewhere).sum()
        losses[f"hm_loss_head_{number}"] = total / (heatmap == 1).sum().clamp(min=1)
        error = plain_box_error(head, *(value[:, number] for value in targets[1:]))
        box_loss = loc_weight * (error @ torch.tensor(CODE_WEIGHTS))
        losses[f"loc_loss_head_{number}"] = box_loss / targets.mask[:, number].sum().clamp(min=1)
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def plain_box_error(head: HeadOutput, boxes: Tensor, indices: Tensor, known: Tensor) -> Tensor:
    """Absolute error of each of the ten numbers, summed over the objects of a head, (10,)."""
    code = torch.cat([head[name] for name in BOX_BRANCHES], dim=1).float().flatten(2)
    predicted = code[torch.arange(len(code))[:, None], :, indices]
    wanted = torch.where(known, boxes, 0.0)
    return torch.where(known, (predicted - wanted).abs(), 0.0).sum((0, 1))


def plain_decode(
    heads: Sequence[HeadOutput], config: NetworkConfig, post: PostProcessing
) -> list[Detections]:
    """As `decode`."""
    post = post.reaching(config.point_cloud_range)
    found = []
    for sample in range(len(heads[0]["hm"])):
        parts = [
            _found_by(head, sample, ids, config, post)
            for head, ids in zip(heads, config.class_ids, strict=True)
        ]
        found.append(Detections(*(torch.cat(values) for values in zip(*parts, strict=True))))
    return found


def _found_by(
    head: HeadOutput, sample: int, class_ids: Sequence[int], config: NetworkConfig, post: PostProcessing
) -> tuple[Tensor, Tensor, Tensor]:
    scores = head["hm"][sample].float().sigmoid()
    cells = [tuple(cell) for cell in (scores > post.score_threshold).nonzero().tolist()]
    cells = sorted(cells, key=lambda cell: -float(scores[cell]))[: post.max_objects_per_head]
    code = torch.cat([head[name][sample] for name in BOX_BRANCHES]).float()
    boxes = [(_box(code[:, row, column], row, column, config), (c, row, column)) for c, row, column in cells]
    assert post.center_range is not None
    low, high = torch.tensor(post.center_range[:3]), torch.tensor(post.center_range[3:])
    boxes = [(box, cell) for box, cell in boxes if bool(((box[:3] >= low) & (box[:3] <= high)).all())]
    kept: list[tuple[Tensor, tuple[int, int, int]]] = []
    for box, cell in boxes[: post.nms_pre]:
        winners = torch.stack([winner for winner, _ in kept]) if kept else torch.zeros(0, 9)
        if bool((rotated_iou_bev(winners, box[None]) <= post.nms_iou).all()):
            kept.append((box, cell))
    kept = kept[: post.nms_post]
    if not kept:
        return torch.zeros(0, 9), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    labels = torch.tensor([class_ids[channel] for _, (channel, _, _) in kept])
    return torch.stack([box for box, _ in kept]), torch.stack([scores[cell] for _, cell in kept]), labels


def _box(code: Tensor, row: int, column: int, config: NetworkConfig) -> Tensor:
    place = (torch.tensor([column, row]) + code[:2]) * config.geometry.stride
    place = place * torch.tensor(config.voxel_size[:2]) + torch.tensor(config.point_cloud_range[:2])
    yaw = torch.atan2(code[7:8], code[6:7])
    return torch.cat([place, code[2:3], code[3:6].exp(), yaw, code[8:10]])
