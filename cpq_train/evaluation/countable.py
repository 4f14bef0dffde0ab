"""Whether anything of a split's ground truth counts: where nothing does, every score would be 0."""

from __future__ import annotations

import numpy as np

from cpq_train.data.census import annotation_rows, of_other_categories, refuse_none_left
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import GroundTruth, Ints
from cpq_train.evaluation.filtering import counts_as_ground_truth, ego_distance


def check_countable(index: NuScenesIndex, rows: Ints, annotations: GroundTruth, split: str) -> list[str]:
    """See that there is something to score.

    Args:
        index: the data set.
        rows: (S,) the samples that are scored.
        annotations: their ground truth.
        split: name of the split, for the message.

    Returns:
        The classes of which no annotation counts: their AP is 0, and part of the mAP.

    Raises:
        UserError: no annotation counts; says which filter removed how many.
    """
    counted = set(annotations.boxes.label[counts_as_ground_truth(annotations)].tolist())
    if counted:
        return [name for class_id, name in enumerate(annotations.task.names) if class_id not in counted]
    num_all = len(annotation_rows(index, rows))
    has_points = annotations.num_points != 0
    far = (
        ego_distance(annotations.boxes, annotations.samples)
        >= annotations.task.ranges_m[annotations.boxes.label]
    )
    removed = {
        of_other_categories(index): num_all - len(annotations.tokens),
        "have neither LiDAR nor radar points": int(np.count_nonzero(~has_points)),
        "lie beyond the range of their class": int(np.count_nonzero(has_points & far)),
        "lie in bicycle racks": int(np.count_nonzero(has_points & ~far)),
    }
    refuse_none_left(f"ground truth of split {split!r}", len(rows), num_all, removed)
