"""Non-maximum suppression of rotated boxes, alike on CPU and CUDA, vectorised over groups of boxes.

Letters: N boxes, G groups, S places of a group, P pairs of boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.models.constants import constant
from cpq_train.models.rotated_iou import circles_meet, pair_iou, rotated_iou_bev

__all__ = ["Kept", "ranked_places", "rotated_iou_bev", "rotated_nms", "suppress"]

_ROUNDS = 16
"""Of suppression, before the host asks a GPU whether more are needed: maps drawn at random took 4 to 8."""


class Kept(NamedTuple):
    """What suppression keeps.

    Attributes:
        places: places in the flattened (G, S), by group and falling score, (N,) int64.
        counts: how many in each group.
    """

    places: Tensor
    counts: list[int]


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
    order_N = scores_N.argsort(descending=True, stable=True)
    order_N = order_N[groups_N[order_N].argsort(stable=True)]
    _, sizes_G = groups_N[order_N].unique_consecutive(return_counts=True)
    most = int(sizes_G.max()) if len(sizes_G) else 0
    most = most if max_pre is None else min(most, max_pre)
    place_GS, is_box_GS = ranked_places(sizes_G, most)
    row_GS = order_N[place_GS]
    kept = suppress(boxes_N7[row_GS], is_box_GS, iou_threshold, max_post)
    return row_GS.flatten()[kept.places]


def ranked_places(sizes_G: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where the first boxes of each group are, in rows that are sorted by group.

    Args:
        sizes_G: rows of each group, int64.
        most: places of each group (S).

    Returns:
        Rows, (G, S) int64, and which of them are there, (G, S) bool; elsewhere the row is some other one.
    """
    end_G = sizes_G.cumsum(0)
    rank_S = torch.arange(most, device=sizes_G.device)
    row_GS = torch.minimum((end_G - sizes_G)[:, None] + rank_S, (end_G[-1:] - 1)[:, None])
    return row_GS, rank_S < sizes_G[:, None]


def suppress(boxes_GS7: Tensor, is_box_GS: Tensor, iou_threshold: float, max_post: int | None = None) -> Kept:
    """Greedy suppression in all groups at once.

    The host waits twice: for the number of pairs that are close, and for the numbers of boxes kept. It waits
    once more for each `_ROUNDS` links by which a chain of suppressions is longer, which is rare.

    Args:
        boxes_GS7: boxes as in `rotated_iou`, those of a group by falling score, (G, S, 7 or more).
        is_box_GS: places that hold a box; the others neither suppress nor are kept.
        iou_threshold: a box goes when its IoU in the bird's-eye view with one that stays is greater.
        max_post: boxes kept of each group, the best ones.
    """
    winner_P, loser_P = _suppressing_pairs(boxes_GS7.double(), is_box_GS, iou_threshold)
    is_box = torch.cat([is_box_GS.flatten(), is_box_GS.new_zeros(1)])
    stays = is_box
    while True:
        stays, is_settled = _suppressed(stays, is_box, winner_P, loser_P)
        kept_GS = stays[:-1].view_as(is_box_GS)
        if max_post is not None:
            kept_GS = kept_GS & (kept_GS.cumsum(1) <= max_post)
        *counts, settled = torch.cat([kept_GS.sum(1), is_settled]).tolist()
        if settled:
            places = (~kept_GS).flatten().argsort(stable=True)
            return Kept(places[: sum(counts)], counts)


def _suppressing_pairs(boxes_GS7: Tensor, is_box_GS: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Places of pairs (winner, loser) whose IoU exceeds the threshold.

    Of a pair that is close and yet does not, the loser is the place behind the last.
    """
    # Empty places hold NaN, which meets nothing.
    boxes_GS5 = boxes_GS7[..., :5].masked_fill(~is_box_GS[..., None], torch.nan)
    area_GS = boxes_GS5[..., 3] * boxes_GS5[..., 4]
    least_GS = iou_threshold * area_GS  # the IoU of two boxes is at most the ratio of their areas
    close_GSS = circles_meet(boxes_GS5[:, :, None], boxes_GS5[:, None])
    close_GSS &= area_GS[:, :, None] > least_GS[:, None]
    close_GSS &= area_GS[:, None] > least_GS[:, :, None]
    group_P, winner_P, loser_P = close_GSS.triu_(diagonal=1).nonzero(as_tuple=True)
    num_places = is_box_GS.shape[1]
    winner_P, loser_P = group_P * num_places + winner_P, group_P * num_places + loser_P
    rows_N7 = boxes_GS7.flatten(0, 1)
    overlaps_P = pair_iou(rows_N7[winner_P], rows_N7[loser_P]) > iou_threshold
    return winner_P, loser_P.masked_fill(~overlaps_P, is_box_GS.numel())


def _suppressed(stays: Tensor, is_box: Tensor, winner_P: Tensor, loser_P: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy suppression as a fixed point: a box stays unless a box that stays suppresses it.

    Each round settles at least one more box of every chain of suppressions, in order of score, so the rounds
    end after as many as the longest chain has links, with the result of the sequential algorithm. On the CPU
    they go on until then.

    Args:
        stays: boxes that stay so far, by place, and one place behind the last, bool.
        is_box: places that hold a box, likewise.
        winner_P: places of the better boxes of the pairs.
        loser_P: those of the others.

    Returns:
        Boxes that stay now, and whether the last round changed nothing, (1,) bool.
    """
    nowhere = constant((len(is_box) - 1,), is_box.device, torch.int64)
    at_hand = are_numbers_at_hand(is_box.device)
    for _ in range(len(is_box) if at_hand else _ROUNDS):
        before = stays
        stays = is_box.index_fill(0, torch.where(before[winner_P], loser_P, nowhere), False)
        if at_hand and torch.equal(stays, before):
            break
    return stays, (stays == before).all()[None]
