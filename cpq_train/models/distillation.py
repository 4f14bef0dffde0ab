"""Loss from a float teacher: the student answers where, and as, the teacher sees objects.

Most cells of the map are empty, and what a teacher says of them is noise; so every part looks at the
foreground only, as LiDAR-PTQ's global positive loss (Zhou et al., ICLR 2024) and the pivotal positions of
Yang et al. (NeurIPS 2022) do. That empty cells stay empty is the hard targets' work.

Letters: B batch, C channels, K slots per sample, H W rows and columns of the map.
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
from cpq_train.models.divergence import foreground_divergence
from cpq_train.models.losses import box_code_error, box_codes_at
from cpq_train.models.normalisers import Sum, SumOverRanks, divided, one_rank
from cpq_train.models.targets import HeadTargets

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
    heads = list(zip(student.heads, teacher.heads, strict=True))
    with torch.autocast(student.bev_BCHW.device.type, enabled=False):
        sums = {
            "distill_heatmap": _heatmap_divergence(heads),
            "distill_box": _box_error(heads, code_weights),
            "distill_bev": _feature_error(student.bev_BCHW, teacher.bev_BCHW, foreground_of(teacher.heads)),
        }
        parts = divided(sums, sum_over_ranks)
    weights = (config.heatmap_weight, config.box_weight, config.bev_weight)
    return {name: weight * part for weight, (name, part) in zip(weights, parts.items(), strict=True)}


def foreground_of(heads: Sequence[HeadOutput]) -> Tensor:
    """Largest class probability of each cell, (B, 1, H, W) float32."""
    return torch.cat([head["hm"] for head in heads], dim=1).float().amax(1, keepdim=True).sigmoid()


def peaks_of(head: HeadOutput) -> HeadTargets:
    """The cells where a teacher's head sees objects, with its box codes: targets for the student.

    A peak is a cell above `PEAK_THRESHOLD` that none of its eight neighbours exceeds.
    """
    probability_BCHW = head["hm"].float().sigmoid()
    best_BHW = probability_BCHW.amax(1)
    is_peak_BHW = best_BHW == F.max_pool2d(best_BHW, 3, stride=1, padding=1)
    score_BN = torch.where(is_peak_BHW, best_BHW, 0.0).flatten(1)
    score_BK, cell_BK = score_BN.topk(min(MAX_PEAKS, score_BN.shape[1]), dim=1)
    return HeadTargets(probability_BCHW, box_codes_at(head, cell_BK), cell_BK, score_BK > PEAK_THRESHOLD)


def _heatmap_divergence(heads: Sequence[tuple[HeadOutput, HeadOutput]]) -> Sum:
    """Kullback-Leibler divergence of the student's class probabilities, weighted by the teacher's.

    Soft targets (Hinton et al., 2015) for independent classes: the cross-entropy less the teacher's own.
    """
    mine = torch.cat([student["hm"] for student, _ in heads], dim=1).float()
    theirs = torch.cat([teacher["hm"] for _, teacher in heads], dim=1).float()
    return Sum(*foreground_divergence(mine, theirs))


def _box_error(heads: Sequence[tuple[HeadOutput, HeadOutput]], code_weights: Sequence[float]) -> Sum:
    """Weighted absolute error of the box codes at the teacher's peaks, and the number of peaks, by head."""
    errors, counts = zip(*(box_code_error(mine, peaks_of(theirs)) for mine, theirs in heads), strict=True)
    return Sum(torch.stack(errors) @ errors[0].new_tensor(code_weights), torch.stack(counts))


def _feature_error(student_BCHW: Tensor, teacher_BCHW: Tensor, weight_B1HW: Tensor) -> Sum:
    """Energy of the difference, and the energy of the teacher's features, both weighted."""
    theirs = teacher_BCHW.float()
    error = (weight_B1HW * (student_BCHW.float() - theirs).square()).sum()
    return Sum(error, (weight_B1HW * theirs.square()).sum(), least=torch.finfo(theirs.dtype).tiny)
