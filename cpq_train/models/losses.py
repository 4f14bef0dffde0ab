"""Losses of the centre head: penalty-reduced focal loss on the heat maps, weighted L1 on the box codes.

Letters: B batch, K slots per sample, C channels, H W rows and columns of the map. The rules are
OpenPCDet's; where it is odd the choice made here is:

* the order of the box code is centre, z, size, rotation, velocity, so OpenPCDet's ten code weights put
  their 0.2 on the cosine and sine of the yaw, not on the velocity: see `code_weights`;
* OpenPCDet masks unknown (NaN) targets by multiplying with 0, and NaN * 0 makes the loss NaN. Here they are
  selected away, so that an unknown velocity costs nothing and its object still counts in the divisor;
* the heat map is divided by the number of peak cells (two objects in one cell count once), the box loss by
  the number of objects, both of all ranks (`normalisers.py`); with none of them there is no division.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpq_train.models.center_head import HeadOutput, box_codes
from cpq_train.models.code_weights import CODE_WEIGHTS
from cpq_train.models.normalisers import Sum, SumOverRanks, divided, one_rank
from cpq_train.models.targets import HeadTargets

_PROBABILITY_MARGIN = 1e-4


def center_loss(
    heads: Sequence[HeadOutput],
    targets: Sequence[HeadTargets],
    code_weights: Sequence[float] = CODE_WEIGHTS,
    loc_weight: float = 0.25,
    sum_over_ranks: SumOverRanks = one_rank,
) -> dict[str, Tensor]:
    """Loss of all heads, computed in float32 whatever autocast left.

    Args:
        heads: raw outputs of the network by head.
        targets: targets by head.
        code_weights: weight of each of the ten numbers of a box code.
        loc_weight: weight of the box losses against the heat-map losses.
        sum_over_ranks: adds up the numbers of objects, where a step's samples are spread over ranks.

    Returns:
        `loss`, the sum, and its parts `hm_loss_head_0`, `loc_loss_head_0` and so on; scalars, differentiable.
    """
    sums: dict[str, Sum] = {}
    with torch.autocast(heads[0]["hm"].device.type, enabled=False):
        for number, (head, target) in enumerate(zip(heads, targets, strict=True)):
            error_10, num_objects = box_code_error(head, target)
            box_total = loc_weight * (error_10 @ error_10.new_tensor(code_weights))
            sums[f"hm_loss_head_{number}"] = heatmap_loss(head["hm"], target.heatmap)
            sums[f"loc_loss_head_{number}"] = Sum(box_total, num_objects)
        parts = divided(sums, sum_over_ranks)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def heatmap_loss(logits_BCHW: Tensor, target_BCHW: Tensor) -> Sum:
    """Focal loss with fewer penalties around a peak (CornerNet, alpha 2, beta 4).

    Args:
        logits_BCHW: raw heat map.
        target_BCHW: heat map with 1 exactly at the peaks.

    Returns:
        Sum over all cells, and the number of peak cells.
    """
    probability = logits_BCHW.float().sigmoid().clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN)
    is_peak = target_BCHW == 1
    # The published loss ignores cells above 1; there are none.
    at_peaks = probability.log() * (1 - probability) ** 2
    elsewhere = (1 - probability).log() * probability**2 * (1 - target_BCHW) ** 4
    return Sum(-torch.where(is_peak, at_peaks, elsewhere).sum(), is_peak.sum())


def box_code_error(head: HeadOutput, target: HeadTargets) -> tuple[Tensor, Tensor]:
    """Absolute error of each number of the box code.

    Args:
        head: raw outputs of one head.
        target: its targets.

    Returns:
        Errors summed over all objects, (10,), and the number of objects, a scalar.
    """
    predicted_BKC = box_codes_at(head, target.indices)
    known_BKC = target.mask[..., None] & ~target.boxes.isnan()
    # NaN is replaced before the subtraction: behind it, its gradient would be NaN even where it is not
    # selected.
    wanted_BKC = torch.where(known_BKC, target.boxes, 0.0)
    error_BKC = torch.where(known_BKC, (predicted_BKC - wanted_BKC).abs(), 0.0)
    return error_BKC.sum((0, 1)), target.mask.sum()


def box_codes_at(head: HeadOutput, cells_BK: Tensor) -> Tensor:
    """Box codes of a head in the cells y * W + x, (B, K, 10) float32."""
    code_BCHW = box_codes(head).float()
    sample_B1 = torch.arange(len(code_BCHW), device=code_BCHW.device)[:, None]
    # Indexing, not gather: its gradient has a deterministic kernel on CUDA.
    return code_BCHW.flatten(2)[sample_B1, :, cells_BK]
