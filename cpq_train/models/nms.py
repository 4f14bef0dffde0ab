"""Non-maximum suppression of rotated boxes, alike on CPU and CUDA, vectorised over groups of boxes.

Letters: N boxes, G groups, S boxes of the largest group, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_train.models.rotated_iou import circles_meet, pair_iou, rotated_iou_bev

__all__ = ["rotated_iou_bev", "rotated_nms"]


def rotated_nms(
    boxes_N7: Tensor,
    scores_N: Tensor,
    iou_threshold: float,
    groups_N: Tensor | None = None,
    max_pre: int | None = None,
    max_post: int | None = None,
) -> Tensor:
    """Keeps a box unless a kept box of its group with a higher score overlaps it too much.

    Equal scores rank in the order given, so the result does not depend on the device.

    Args:
        boxes_N7: boxes as in `rotated_iou`, (N, 7 or more).
        scores_N: scores, (N,).
        iou_threshold: a box goes when its IoU in the bird's-eye view is greater than this.
        groups_N: boxes suppress each other only inside a group, (N,) int64; None means one group.
        max_pre: boxes of each group that take part, the best ones.
        max_post: boxes kept of each group, the best ones.

    Returns:
        Indices of the kept boxes, by group and falling score, int64.
    """
    if groups_N is None:
        groups_N = torch.zeros_like(scores_N, dtype=torch.int64)
    order = scores_N.argsort(descending=True, stable=True)
    order = order[groups_N[order].argsort(stable=True)]
    order = order[: len(order)] if max_pre is None else order[rank_in_group(groups_N[order]) < max_pre]
    groups = groups_N[order]
    kept = _greedy(*_suppressing_pairs(boxes_N7[order].double(), groups, iou_threshold), len(order))
    order, groups = order[kept], groups[kept]
    return order if max_post is None else order[rank_in_group(groups) < max_post]


def rank_in_group(groups_N: Tensor) -> Tensor:
    """Position of each row inside its group, for rows sorted by group, (N,) int64."""
    first_N = torch.searchsorted(groups_N, groups_N)
    return torch.arange(len(groups_N), device=groups_N.device) - first_N


def _suppressing_pairs(boxes_N7: Tensor, groups_N: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Pairs (winner, loser) whose IoU exceeds the threshold; rows are sorted by group and score."""
    winner_P, loser_P = _close_pairs(boxes_N7, groups_N)
    area_N = boxes_N7[:, 3] * boxes_N7[:, 4]
    smaller = torch.minimum(area_N[winner_P], area_N[loser_P])
    larger = torch.maximum(area_N[winner_P], area_N[loser_P])
    possible = smaller > iou_threshold * larger  # the IoU of two boxes is at most the ratio of their areas
    winner_P, loser_P = winner_P[possible], loser_P[possible]
    overlaps = pair_iou(boxes_N7[winner_P], boxes_N7[loser_P]) > iou_threshold
    return winner_P[overlaps], loser_P[overlaps]


def _close_pairs(boxes_N7: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of rows of one group, the better one first, whose surrounding circles meet."""
    if len(boxes_N7) == 0:
        return groups_N, groups_N
    _, group_N, sizes = groups_N.unique_consecutive(return_inverse=True, return_counts=True)
    rank_N = rank_in_group(groups_N)
    row_GS = groups_N.new_zeros((len(sizes), int(sizes.max())))
    row_GS[group_N, rank_N] = torch.arange(len(groups_N), device=groups_N.device)
    # Empty places hold NaN, which meets nothing.
    boxes_GS5 = boxes_N7.new_full((*row_GS.shape, 5), torch.nan)
    boxes_GS5[group_N, rank_N] = boxes_N7[:, :5]
    meet_GSS = circles_meet(boxes_GS5[:, :, None], boxes_GS5[:, None])
    group, winner, loser = meet_GSS.triu_(diagonal=1).nonzero(as_tuple=True)
    return row_GS[group, winner], row_GS[group, loser]


def _greedy(winner_P: Tensor, loser_P: Tensor, num_boxes: int) -> Tensor:
    """Greedy suppression as a fixed point: a box stays unless a box that stays suppresses it.

    Each round settles at least one more box of every chain of suppressions, in order of score, so the loop
    ends after as many rounds as the longest chain has links, with the result of the sequential algorithm.
    """
    kept_N = torch.ones(num_boxes, dtype=torch.bool, device=winner_P.device)
    while True:
        next_N = torch.ones_like(kept_N)
        next_N[loser_P[kept_N[winner_P]]] = False
        if torch.equal(next_N, kept_N):
            return kept_N
        kept_N = next_N
