"""Losses of the centre head: penalty-reduced focal loss on the heat maps, weighted L1 on the box codes.

All heads are computed at once. Letters: B batch, G heads, K slots of a head and sample, C classes of all
heads, H W rows and columns of the map. The rules are OpenPCDet's; where it is odd the choice made here is:

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

from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput
from cpq_train.models.code_weights import CODE_WEIGHTS
from cpq_train.models.constants import constant
from cpq_train.models.normalisers import Sum, SumOverRanks, divided, one_rank
from cpq_train.models.targets import BOX_CODE_SIZE, Targets

_PROBABILITY_MARGIN = 1e-4


def center_loss(
    heads: Sequence[HeadOutput],
    targets: Targets,
    code_weights: Sequence[float] = CODE_WEIGHTS,
    loc_weight: float = 0.25,
    sum_over_ranks: SumOverRanks = one_rank,
) -> dict[str, Tensor]:
    """Loss of all heads, computed in float32 whatever autocast left.

    Gradients are to the bit those of heads that are taken one by one; the last digits of the loss are not,
    because its sums run in another order.

    Args:
        heads: raw outputs of the network by head.
        targets: what they should say.
        code_weights: weight of each of the ten numbers of a box code.
        loc_weight: weight of the box losses against the heat-map losses.
        sum_over_ranks: adds up the numbers of objects, where a step's samples are spread over ranks.

    Returns:
        `loss`, the sum, and its parts `hm_loss_head_0`, `loc_loss_head_0` and so on; scalars, differentiable.
    """
    device = targets.heatmap.device
    with torch.autocast(device.type, enabled=False):
        heatmaps = heatmap_loss(heads, targets.heatmap)
        error_G10, num_objects_G = box_code_error(heads, targets)
        box_totals_G = loc_weight * (error_G10 @ constant(tuple(code_weights), device))
        totals = torch.stack([heatmaps.total, box_totals_G])
        divisors = torch.stack([heatmaps.divisor, num_objects_G])
        (parts,) = divided([Sum(totals, divisors)], sum_over_ranks)
        losses = {"loss": parts.sum()}
    for number, (heatmap, box) in enumerate(parts.unbind(1)):
        losses[f"hm_loss_head_{number}"], losses[f"loc_loss_head_{number}"] = heatmap, box
    return losses


def heatmap_loss(heads: Sequence[HeadOutput], target_BCHW: Tensor) -> Sum:
    """Focal loss with fewer penalties around a peak (CornerNet, alpha 2, beta 4).

    Args:
        heads: raw outputs of the network by head, of which the heat maps count.
        target_BCHW: heat maps of all heads, with 1 exactly at the peaks.

    Returns:
        By head: sum over all cells, and the number of peak cells; (G,) float32 each.
    """
    logits_BCHW = torch.cat([head["hm"] for head in heads], dim=1).float()
    probability = logits_BCHW.sigmoid().clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN)
    complement = 1 - probability
    is_peak = target_BCHW == 1
    right = torch.where(is_peak, probability, complement)
    wrong = torch.where(is_peak, complement, probability)
    # The published loss ignores cells above 1; there are none.
    weight = ((1 - target_BCHW) ** 4).masked_fill(is_peak, 1.0)
    cells = right.log() * wrong**2 * weight
    by_class_2C = torch.stack([cells.sum((0, 2, 3)), is_peak.sum((0, 2, 3))])
    # Masked, not multiplied with 0: a head that is NaN would make NaN of all.
    by_head_2G = by_class_2C[:, None].masked_fill(_is_class_of_another_head(heads), 0.0).sum(2)
    return Sum(-by_head_2G[0], by_head_2G[1])


def _is_class_of_another_head(heads: Sequence[HeadOutput]) -> Tensor:
    """By head and class of all heads, (G, C) bool."""
    owners = [number for number, head in enumerate(heads) for _ in range(head["hm"].shape[1])]
    is_other = tuple(tuple(owner != number for owner in owners) for number in range(len(heads)))
    return constant(is_other, heads[0]["hm"].device, torch.bool)


def box_code_error(heads: Sequence[HeadOutput], targets: Targets) -> tuple[Tensor, Tensor]:
    """Absolute error of each number of the box codes.

    Args:
        heads: raw outputs of the network by head.
        targets: what they should say.

    Returns:
        Errors summed over all objects of a head, (G, 10), and the number of its objects, (G,) int64.
    """
    difference_BGKC = box_codes_at(heads, targets.indices) - targets.boxes
    # Masked before the absolute value, whose gradient at NaN would be NaN even where it is not selected.
    error_BGKC = difference_BGKC.masked_fill(~targets.known, 0.0).abs()
    return error_BGKC.sum((0, 2)), targets.mask.sum((0, 2))


def box_codes_at(heads: Sequence[HeadOutput], cells_BGK: Tensor) -> Tensor:
    """Box codes of all heads in the cells y * W + x, (B, G, K, 10) float32."""
    code_BCHW = torch.cat([head[name] for head in heads for name in BOX_BRANCHES], dim=1).float()
    batch_size, num_heads, _ = cells_BGK.shape
    code_BGCN = code_BCHW.reshape(batch_size, num_heads, BOX_CODE_SIZE, -1)
    device = cells_BGK.device
    sample_B11 = constant(tuple(range(batch_size)), device, torch.int64)[:, None, None]
    head_G1 = constant(tuple(range(num_heads)), device, torch.int64)[:, None]
    # Indexing, not gather: its gradient has a deterministic kernel on CUDA.
    return code_BGCN[sample_B11, head_G1, :, cells_BGK]
