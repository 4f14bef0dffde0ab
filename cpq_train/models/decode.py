"""From raw head outputs to boxes: peaks, decoding, range and score filter, NMS by head.

Letters: B batch, C classes of all heads, H W rows and columns of the map, N boxes, G heads (with all samples'
heads in a row where there is no B), S places of the best cells. The rules are OpenPCDet's: no 3x3 peak
pooling, the best K cells of a head over all its classes (a cell may appear for two classes), suppression
inside a head regardless of class. Chosen here: equal scores rank by class, row and column, on every device
alike; a map with fewer than K cells is fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.models.center_head import HeadOutput
from cpq_train.models.config import BevGeometry, NetworkConfig
from cpq_train.models.constants import constant
from cpq_train.models.losses import box_codes_at
from cpq_train.models.nms import ranked_places, suppress

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


class _Candidates(NamedTuple):
    """The best cells of each head and sample by falling score.

    Attributes:
        cell: y * W + x, (B, G, S) int64.
        channel: class, counted over all heads, (B, G, S) int64.
        scores: (B, G, S) float32.
        is_there: places that hold a candidate, (B, G, S) bool; elsewhere is some other one.
    """

    cell: Tensor
    channel: Tensor
    scores: Tensor
    is_there: Tensor


@torch.no_grad()
def decode(heads: Sequence[HeadOutput], config: NetworkConfig, post: PostProcessing) -> list[Detections]:
    """Finds the boxes of every sample.

    The host waits for a GPU three times, however many samples and heads there are: for the number of cells
    above the threshold, and twice in `suppress`.

    Args:
        heads: raw outputs of the network by head.
        config: gives the class ids by head, and the map.
        post: filters and suppression.

    Returns:
        Detections by sample, on the device of the outputs.
    """
    post = post.reaching(config.point_cloud_range)
    found = _candidates(heads, post)
    device, num_heads = found.cell.device, len(heads)
    boxes_BGS9 = _boxes(box_codes_at(heads, found.cell), found.cell, config.geometry)
    assert post.center_range is not None
    low, high = constant((post.center_range[:3], post.center_range[3:]), device).unbind()
    inside_BGS = ((boxes_BGS9[..., :3] >= low) & (boxes_BGS9[..., :3] <= high)).all(-1) & found.is_there
    enters_BGS = inside_BGS & (inside_BGS.cumsum(2) <= post.nms_pre)
    kept = suppress(boxes_BGS9.flatten(0, 1), enters_BGS.flatten(0, 1), post.nms_iou, post.nms_post)

    boxes = boxes_BGS9.flatten(0, 2)[kept.places]
    scores = found.scores.flatten()[kept.places]
    class_ids = constant(tuple(i for ids in config.class_ids for i in ids), device, torch.int64)
    labels = class_ids[found.channel.flatten()[kept.places]]
    sizes = [sum(kept.counts[i : i + num_heads]) for i in range(0, len(kept.counts), num_heads)]
    of_samples = zip(boxes.split(sizes), scores.split(sizes), labels.split(sizes), strict=True)
    return [Detections(*of_sample) for of_sample in of_samples]


def _candidates(heads: Sequence[HeadOutput], post: PostProcessing) -> _Candidates:
    """The best cells above the threshold of each head and sample, at most `max_objects_per_head`."""
    scores_BCHW = torch.cat([head["hm"] for head in heads], dim=1).float().sigmoid()
    batch_size, num_channels, height, width = scores_BCHW.shape
    num_cells, device = height * width, scores_BCHW.device
    scores = scores_BCHW.flatten()
    # Cells below the threshold cannot survive, so that they need not be sorted.
    above_N = (scores > post.score_threshold).nonzero()[:, 0]
    # Samples, and in them heads, follow one another.
    ends = list(accumulate(head["hm"].shape[1] * num_cells for _ in range(batch_size) for head in heads))
    end_G = torch.searchsorted(above_N, constant(tuple(ends), device, torch.int64))
    sizes_G = end_G.diff(prepend=end_G.new_zeros(1))
    group_N = torch.searchsorted(end_G, torch.arange(len(above_N), device=device), right=True)
    # Positive floats rank as their bits do; equal keys stay in order.
    key_N = (group_N << 32) - scores[above_N].view(torch.int32)
    sorted_N = above_N[key_N.argsort(stable=True)]

    most = min(post.max_objects_per_head, len(above_N))
    if are_numbers_at_hand(device):
        most = min(most, int(sizes_G.max()))
    place_GS, is_there_GS = ranked_places(sizes_G, most)
    flat_BGS = sorted_N[place_GS].unflatten(0, (batch_size, len(heads)))
    is_there_BGS = is_there_GS.view_as(flat_BGS)
    channel_BGS = flat_BGS // num_cells % num_channels
    return _Candidates(flat_BGS % num_cells, channel_BGS, scores[flat_BGS], is_there_BGS)


def _boxes(code_BGSC: Tensor, cell_BGS: Tensor, geometry: BevGeometry) -> Tensor:
    """Boxes (B, G, S, 9) in the LiDAR frame from box codes and their cells y * W + x."""
    place_BGS2 = torch.stack([cell_BGS % geometry.width, cell_BGS // geometry.width], dim=-1)
    numbers = (geometry.voxel_size[:2], geometry.point_cloud_range[:2])
    voxel_m, origin_m = constant(numbers, code_BGSC.device).unbind()
    parts = (
        (place_BGS2 + code_BGSC[..., 0:2]) * geometry.stride * voxel_m + origin_m,
        code_BGSC[..., 2:3],
        code_BGSC[..., 3:6].exp(),
        torch.atan2(code_BGSC[..., 7:8], code_BGSC[..., 6:7]),
        code_BGSC[..., 8:10],
    )
    return torch.cat(parts, dim=-1)
