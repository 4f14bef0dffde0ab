"""From raw head outputs to boxes: peaks, decoding, range and score filter, NMS by head.

Letters: B batch, C channels, H W rows and columns of the map, N boxes. The rules are OpenPCDet's: no 3x3 peak
pooling, the best K cells of a head over all its classes (a cell may appear for two classes), suppression
inside a head regardless of class. Chosen here: equal scores rank by class, row and column, on every device
alike; a map with fewer than K cells is fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput
from cpq_train.models.config import BevGeometry, NetworkConfig
from cpq_train.models.nms import rank_in_group, rotated_nms

CENTER_RANGE: Final = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
"""Of box centres, as published for nuScenes: x, y, z minimum, then maximum, metres."""


@dataclass(frozen=True)
class PostProcessing:
    """How raw outputs become boxes. It has to be identical for all models that are compared.

    Attributes:
        max_objects_per_head: cells taken from each head and sample, the best ones (K).
        score_threshold: a box needs a greater score than this.
        center_range: x, y, z minimum, then maximum, of a box centre in the LiDAR frame, metres, inclusive;
            null is +-61.2 m (z: +-10 m), and as far as the point cloud range where that reaches further.
        nms_iou: boxes with a greater IoU (bird's-eye view) than this suppress each other.
        nms_pre: boxes of each head and sample that enter the NMS.
        nms_post: boxes of each head and sample that leave it.
    """

    max_objects_per_head: int = 500
    score_threshold: float = 0.1
    center_range: tuple[float, float, float, float, float, float] | None = None
    nms_iou: float = 0.2
    nms_pre: int = 1000
    nms_post: int = 83

    def __post_init__(self) -> None:
        if self.center_range is not None:
            object.__setattr__(self, "center_range", tuple(self.center_range))
        for name in ("max_objects_per_head", "nms_pre", "nms_post"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for name in ("score_threshold", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected a number between 0 and 1")
        if self.center_range is not None and len(self.center_range) != 6:
            raise UserError(f"center_range is {self.center_range}: expected 6 values")

    def reaching(self, point_cloud_range: Sequence[float]) -> PostProcessing:
        """With the center range that null stands for; a set one is taken as it is.

        Args:
            point_cloud_range: x, y, z minimum, then maximum, of the network, metres.
        """
        if self.center_range is not None:
            return self
        ends = list(zip(CENTER_RANGE, map(float, point_cloud_range), strict=True))
        x, y, z = (min(pair) for pair in ends[:3])
        far_x, far_y, far_z = (max(pair) for pair in ends[3:])
        return replace(self, center_range=(x, y, z, far_x, far_y, far_z))


@dataclass(frozen=True)
class Detections:
    """Boxes found in one sample, by head and falling score.

    Attributes:
        boxes: x, y, z, length, width, height (m), yaw (rad), velocity x, y (m/s) in the LiDAR frame, (N, 9).
        scores: (N,) float32.
        labels: class ids, indices into `NetworkConfig.class_names`, (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _Candidates:
    """Boxes of one head over all samples, sorted by sample and falling score."""

    sample: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor


@torch.no_grad()
def decode(heads: Sequence[HeadOutput], config: NetworkConfig, post: PostProcessing) -> list[Detections]:
    """Finds the boxes of every sample.

    Args:
        heads: raw outputs of the network by head.
        config: gives the class ids by head, and the map.
        post: filters and suppression.

    Returns:
        Detections by sample, on the device of the outputs.
    """
    post = post.reaching(config.point_cloud_range)
    pairs = zip(heads, config.class_ids, strict=True)
    found = [_candidates(head, ids, config.geometry, post) for head, ids in pairs]
    batch_size = heads[0]["hm"].shape[0]
    return [_suppress([_of_sample(head, sample) for head in found], post) for sample in range(batch_size)]


def _candidates(
    head: HeadOutput, group_class_ids: Sequence[int], geometry: BevGeometry, post: PostProcessing
) -> _Candidates:
    """The best cells of one head, decoded; those outside `center_range` drop out."""
    scores_BCHW = head["hm"].float().sigmoid()
    # Cells below the threshold cannot survive, so that they need not be sorted.
    sample, channel, row, column = (scores_BCHW > post.score_threshold).nonzero(as_tuple=True)
    scores = scores_BCHW[sample, channel, row, column]
    order = scores.argsort(descending=True, stable=True)
    order = order[sample[order].argsort(stable=True)]
    order = order[rank_in_group(sample[order]) < post.max_objects_per_head]
    sample, channel, row, column = (index[order] for index in (sample, channel, row, column))

    code_N10 = torch.cat([head[name][sample, :, row, column] for name in BOX_BRANCHES], dim=1).float()
    boxes_N9 = _boxes(code_N10, row, column, geometry)
    limits = boxes_N9.new_tensor(post.center_range)
    inside = ((boxes_N9[:, :3] >= limits[:3]) & (boxes_N9[:, :3] <= limits[3:])).all(1)
    labels = torch.tensor(group_class_ids, device=channel.device)[channel]
    return _Candidates(sample[inside], boxes_N9[inside], scores[order][inside], labels[inside])


def _boxes(code_N10: Tensor, row_N: Tensor, column_N: Tensor, geometry: BevGeometry) -> Tensor:
    """Boxes (N, 9) in the LiDAR frame from box codes and their cells."""
    cells_N2 = torch.stack([column_N, row_N], dim=1) + code_N10[:, 0:2]
    voxel_m = code_N10.new_tensor(geometry.voxel_size[:2])
    origin_m = code_N10.new_tensor(geometry.point_cloud_range[:2])
    parts = (
        cells_N2 * geometry.stride * voxel_m + origin_m,
        code_N10[:, 2:3],
        code_N10[:, 3:6].exp(),
        torch.atan2(code_N10[:, 7:8], code_N10[:, 6:7]),
        code_N10[:, 8:10],
    )
    return torch.cat(parts, dim=1)


def _of_sample(candidates: _Candidates, sample: int) -> _Candidates:
    mine = candidates.sample == sample
    return _Candidates(sample=candidates.sample[mine], boxes=candidates.boxes[mine],
                       scores=candidates.scores[mine], labels=candidates.labels[mine])  # fmt: skip


def _suppress(heads: Sequence[_Candidates], post: PostProcessing) -> Detections:
    """NMS inside each head of one sample, all heads at once."""
    boxes = torch.cat([head.boxes for head in heads])
    scores = torch.cat([head.scores for head in heads])
    labels = torch.cat([head.labels for head in heads])
    sizes = torch.tensor([len(head.scores) for head in heads], device=boxes.device)
    groups = torch.repeat_interleave(sizes)
    kept = rotated_nms(boxes, scores, post.nms_iou, groups, post.nms_pre, post.nms_post)
    return Detections(boxes[kept], scores[kept], labels[kept])
