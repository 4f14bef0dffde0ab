"""How far the outputs of a network are from those of a reference, at the reference's objects.

Letters: B batch, C channels, H W rows and columns of the head's map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log10
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput, box_codes

_FLOAT32_NOISE = torch.finfo(torch.float32).eps ** 2
"""Noise below this share of the signal's power is that of fp32; it keeps the SQNR finite."""


class OutputDistance(NamedTuple):
    """Distance of head outputs from a reference; all are 0 (`sqnr_db` about 138) where they agree.

    Attributes:
        heatmap: Divergence of the class probabilities, nats: mean over cells and classes, weighted by the
            reference's probability.
        boxes: Divergence of the box codes, read as the means of Gaussians of variance 1 in each number's own
            unit, half a weighted square: mean over cells, weighted by the reference's largest probability.
        sqnr_db: 10 log10(power of the reference / power of the difference), mean over the six branches.
    """

    heatmap: float
    boxes: float
    sqnr_db: float


def output_distance(
    pairs: Iterable[tuple[Sequence[HeadOutput], Sequence[HeadOutput]]], code_weights: Sequence[float]
) -> OutputDistance:
    """Compare outputs with those of a reference, over all batches and heads.

    Args:
        pairs: Raw outputs of the reference and of the network, by batch.
        code_weights: Weight of each of the ten numbers of a box code, as in the loss.
    """
    at_objects: list[Tensor] = []
    powers: dict[str, list[Tensor]] = {name: [] for name in (*BOX_BRANCHES, "hm")}
    for references, outputs in pairs:
        for reference, output in zip(references, outputs, strict=True):
            at_objects.append(_at_objects(reference, output, code_weights))
            for name, of_branch in powers.items():
                of_branch.append(_signal_and_noise(reference[name], output[name]))
    heatmap, heatmap_weight, boxes, boxes_weight = torch.stack(at_objects).sum(0).tolist()
    sqnrs = [_sqnr_db(*torch.stack(power).sum(0).tolist()) for power in powers.values()]
    return OutputDistance(heatmap / heatmap_weight, boxes / boxes_weight, sum(sqnrs) / len(sqnrs))


def foreground_divergence(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence of independent class probabilities, weighted by the reference's.

    Args:
        logits: Raw heat maps, (B, C, H, W).
        reference: Those of the reference.

    Returns:
        The weighted sum over all cells and classes, nats, and the sum of the weights; scalars.
    """
    probability = reference.sigmoid()
    cross, own = (
        F.binary_cross_entropy_with_logits(x, probability, reduction="none") for x in (logits, reference)
    )
    return (probability * (cross - own)).sum(), probability.sum()


def _at_objects(reference: HeadOutput, output: HeadOutput, code_weights: Sequence[float]) -> Tensor:
    """Summed heat-map divergence and its weight, summed box divergence and its weight; (4,) fp64."""
    heatmap, heatmap_weight = foreground_divergence(output["hm"].double(), reference["hm"].double())
    difference_BCHW = box_codes(output).double() - box_codes(reference).double()
    weights_C = difference_BCHW.new_tensor(code_weights)
    boxes_BHW = torch.einsum("bchw,c->bhw", difference_BCHW.square(), weights_C) / 2
    object_BHW = reference["hm"].double().amax(1).sigmoid()
    return torch.stack([heatmap, heatmap_weight, (object_BHW * boxes_BHW).sum(), object_BHW.sum()])


def _signal_and_noise(reference: Tensor, output: Tensor) -> Tensor:
    reference = reference.double()
    return torch.stack([(reference**2).sum(), ((output.double() - reference) ** 2).sum()])


def _sqnr_db(signal: float, noise: float) -> float:
    return 10 * log10(signal / max(noise, signal * _FLOAT32_NOISE))
