"""How far the score of a tuned network is from those it is measured against; imports no torch."""

from __future__ import annotations

COMPARED_METRICS = ("mAP", "NDS")


def share_won_back(baseline: float, ptq: float, tuned: float) -> float | None:
    """Share of the PTQ loss that tuning won back: 1 where it reaches float, negative where it lost more.

    None where PTQ lost nothing.
    """
    loss = baseline - ptq
    return (tuned - ptq) / loss if loss > 0 else None
