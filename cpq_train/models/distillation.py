"""Loss from a float teacher: the student answers where, and as, the teacher sees objects.

Most cells of the map are empty, and what a teacher says of them is noise; so every part looks at the
foreground only, as LiDAR-PTQ's global positive loss (Zhou et al., ICLR 2024) and the pivotal positions of
Yang et al. (NeurIPS 2022) do. That empty cells stay empty is the hard targets' work.

Letters: B batch, C channels, G heads, K slots of a head and sample, H W rows and columns of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.models.center_head import HeadOutput
from cpq_train.models.centerpoint import CenterPoint
from cpq_train.models.constants import constant
from cpq_train.models.divergence import foreground_divergence
from cpq_train.models.losses import box_code_error, box_codes_at
from cpq_train.models.normalisers import Sum, SumOverRanks, divided, one_rank
from cpq_train.models.targets import Targets

PEAK_THRESHOLD = 0.1
"""Probability above which a local maximum of the teacher counts as an object, that of decoding."""

MAX_PEAKS = 200
"""Peaks per head and sample whose boxes are compared."""


@dataclass(frozen=True)
class DistillationConfig:
    """What the student learns from a float teacher.

    With the default weights the gradient of each part was a tenth of that of the detection loss, on a batch
    of the quickstart data and its network calibrated at 4 bits.

    Args:
        teacher: Float checkpoint; null takes `model.weights` where that is one.
        heatmap_weight: Weight of the divergence of the class probabilities.
        box_weight: Weight of the difference of the box codes at the teacher's peaks.
        bev_weight: Weight of the difference of the BEV features.

    Raises:
        UserError: A weight is negative or not finite.
    """

    teacher: str | None = None
    heatmap_weight: float = 10.0
    box_weight: float = 0.25
    bev_weight: float = 5.0

    def __post_init__(self) -> None:
        for name in ("heatmap_weight", "box_weight", "bev_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"model.distillation.{name} is {value!r}; accepted: 0 and above")


class Outputs(NamedTuple):
    """What the loss compares.

    Attributes:
        heads: Raw outputs of the network by head.
        bev_BCHW: Output of `backbone_2d`.
    """

    heads: list[HeadOutput]
    bev_BCHW: Tensor


def run_observed(
    network: CenterPoint, voxel_features_VC: Tensor, voxel_coords_V4: Tensor, batch_size: int
) -> Outputs:
    """Run the network (arguments as in its `forward`) and catch its BEV features on the way."""
    caught: list[Tensor] = []
    hook = network.backbone_2d.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        heads = network(voxel_features_VC, voxel_coords_V4, batch_size)
    finally:
        hook.remove()
    return Outputs(heads, caught[0])


def distillation_loss(
    student: Outputs,
    teacher: Outputs,
    config: DistillationConfig,
    code_weights: Sequence[float],
    sum_over_ranks: SumOverRanks = one_rank,
) -> dict[str, Tensor]:
    """The weighted parts of the loss; each is 0 where the student equals the teacher.

    Args:
        student: Gradients flow to these.
        teacher: Without gradients.
        config: Weights of the parts.
        code_weights: Weight of each of the ten numbers of a box code.
        sum_over_ranks: Adds up what the parts are divided by, where a step's samples are spread over ranks.

    Returns:
        `distill_heatmap`, `distill_box` and `distill_bev`; float32 scalars, whatever autocast left.
    """
    with torch.autocast(student.bev_BCHW.device.type, enabled=False):
        sums = {
            "distill_heatmap": _heatmap_divergence(student.heads, teacher.heads),
            "distill_box": _box_error(student.heads, teacher.heads, code_weights),
            "distill_bev": _feature_error(student.bev_BCHW, teacher.bev_BCHW, foreground_of(teacher.heads)),
        }
        parts = divided(list(sums.values()), sum_over_ranks)
    weights = (config.heatmap_weight, config.box_weight, config.bev_weight)
    return {name: weight * part.sum() for name, weight, part in zip(sums, weights, parts, strict=True)}


def foreground_of(heads: Sequence[HeadOutput]) -> Tensor:
    """Largest class probability of each cell, (B, 1, H, W) float32."""
    return _logits_of(heads).amax(1, keepdim=True).sigmoid()


def peaks_of(heads: Sequence[HeadOutput]) -> Targets:
    """The cells where a teacher's heads see objects, with their box codes: targets for the student.

    A peak is a cell above `PEAK_THRESHOLD` that none of its eight neighbours exceeds.
    """
    probability_BCHW = _logits_of(heads).sigmoid()
    of_heads = probability_BCHW.split([head["hm"].shape[1] for head in heads], dim=1)
    best_BGHW = torch.stack([probability.amax(1) for probability in of_heads], dim=1)
    is_peak_BGHW = best_BGHW == F.max_pool2d(best_BGHW, 3, stride=1, padding=1)
    score_BGN = best_BGHW.masked_fill(~is_peak_BGHW, 0.0).flatten(2)
    score_BGK, cell_BGK = score_BGN.topk(min(MAX_PEAKS, score_BGN.shape[2]), dim=2)
    boxes_BGKC = box_codes_at(heads, cell_BGK)
    known_BGKC = (score_BGK > PEAK_THRESHOLD)[..., None] & ~boxes_BGKC.isnan()
    return Targets(probability_BCHW, boxes_BGKC, cell_BGK, known_BGKC)


def _logits_of(heads: Sequence[HeadOutput]) -> Tensor:
    """Raw heat maps of all heads, (B, C, H, W) float32."""
    return torch.cat([head["hm"] for head in heads], dim=1).float()


def _heatmap_divergence(student: Sequence[HeadOutput], teacher: Sequence[HeadOutput]) -> Sum:
    """Kullback-Leibler divergence of the student's class probabilities, weighted by the teacher's.

    Soft targets (Hinton et al., 2015) for independent classes: the cross-entropy less the teacher's own.
    """
    return Sum(*foreground_divergence(_logits_of(student), _logits_of(teacher)))


def _box_error(
    student: Sequence[HeadOutput], teacher: Sequence[HeadOutput], code_weights: Sequence[float]
) -> Sum:
    """Weighted absolute error of the box codes at the teacher's peaks, and the number of peaks, by head."""
    error_G10, num_peaks_G = box_code_error(student, peaks_of(teacher))
    return Sum(error_G10 @ constant(tuple(code_weights), error_G10.device), num_peaks_G)


def _feature_error(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Sum:
    """Energy of the difference, and the energy of the teacher's features, both weighted."""
    theirs = teacher_BCHW.float()
    error = (weight_B1HW * (student_BCHW.float() - theirs).square()).sum()
    return Sum(error, (weight_B1HW * theirs.square()).sum(), least=torch.finfo(theirs.dtype).tiny)
