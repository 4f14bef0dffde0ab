"""Between the two numberings of classes: a network's own, and the task's in the index and in evaluation.

A network's class id is an index into the class names that it was given, and its label is one more, since 0
is padding. The task's class id is an index into its classes, -1 for a category outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.detection_task import NUSCENES, DetectionTask


def labels_of_ids(class_names: Sequence[str], task: DetectionTask = NUSCENES) -> NDArray[np.int64]:
    """Label of each class id of a task, (classes + 1,): 0 for a class of no name, and at the end for id -1.

    Raises:
        UserError: see `DetectionTask.ids`.
    """
    labels = np.zeros(len(task.names) + 1, dtype=np.int64)
    labels[task.ids(class_names)] = np.arange(len(class_names)) + 1
    return labels
