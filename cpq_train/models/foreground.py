"""How far a network's outputs are from another's where there are objects.

The idea is LiDAR-PTQ's task-guided loss (Zhou et al., ICLR 2024): most cells of the map are empty, and an
error there costs no object, so errors count by how sure the float network is of an object in the cell.

Letters: B batch, C channels, H W rows and columns of the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_train.models.center_head import HeadOutput, box_codes

SCORE_THRESHOLD = 0.1
"""Cells below it are background; also what decoding keeps by default."""


def foreground_weight(heads: Sequence[HeadOutput]) -> list[Tensor]:
    """How much each cell is foreground.

    Args:
        heads: Raw outputs by head.

    Returns:
        By head (B, 1, H, W): the largest class probability, 0 where it is below `SCORE_THRESHOLD`.
    """
    best = [head["hm"].float().sigmoid().amax(1, keepdim=True) for head in heads]
    return [torch.where(probability > SCORE_THRESHOLD, probability, 0.0) for probability in best]


def foreground_error(float_heads: Sequence[HeadOutput], heads: Sequence[HeadOutput]) -> Tensor:
    """Weighted mean over foreground cells of what another network puts out differently.

    Per cell: the absolute differences of the class probabilities, summed, and those of the box code,
    averaged.

    Args:
        float_heads: Raw outputs of the network to follow; they say where the foreground is.
        heads: Raw outputs to judge.

    Returns:
        Scalar, summed over heads, differentiable in `heads`; 0 without foreground.
    """
    weights = foreground_weight(float_heads)
    errors = [_error(*of_head) for of_head in zip(float_heads, heads, weights, strict=True)]
    return torch.stack(errors).sum()


def _error(wanted: HeadOutput, head: HeadOutput, weight_B1HW: Tensor) -> Tensor:
    heatmap = (head["hm"].float().sigmoid() - wanted["hm"].float().sigmoid()).abs().sum(1, keepdim=True)
    boxes = (box_codes(head).float() - box_codes(wanted).float()).abs().mean(1, keepdim=True)
    return (weight_B1HW * (heatmap + boxes)).sum() / weight_B1HW.sum().clamp(min=1e-6)
