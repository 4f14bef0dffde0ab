"""How far the score of a tuned network is from those it is measured against; imports no torch."""

from __future__ import annotations

from cpq_train.common.detection_task import DetectionTask

NO_NDS = "The classes are the data set's own: the NDS is defined for nuScenes' ten and their rules alone."

HEADLINE = ("mAP", "NDS")
"""The scores that are compared; other classes than nuScenes' ten have no NDS."""


def compared_metrics(task: DetectionTask) -> tuple[str, ...]:
    """Those of `HEADLINE` that a task has."""
    return HEADLINE if task.is_nuscenes else HEADLINE[:1]


def share_won_back(baseline: float, ptq: float, tuned: float) -> float | None:
    """Share of the PTQ loss that tuning won back: 1 where it reaches float, negative where it lost more.

    None where PTQ lost nothing.
    """
    loss = baseline - ptq
    return (tuned - ptq) / loss if loss > 0 else None
