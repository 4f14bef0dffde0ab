"""Between the two numberings of classes: a network's own, and nuScenes' in the index and in evaluation.

A network's class id is an index into the class names that it was given, and its label is one more, since 0
is padding. nuScenes' class id is an index into `DETECTION_CLASSES`, -1 for a category outside the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES


def nuscenes_ids(class_names: Sequence[str]) -> NDArray[np.int64]:
    """NuScenes' class id of each of a network's classes, (C,).

    Raises:
        UserError: a name is that of no nuScenes detection class.
    """
    for name in class_names:
        if name not in DETECTION_CLASSES:
            raise UserError(
                f"class_names names {name!r}: accepted with nuScenes data are {', '.join(DETECTION_CLASSES)}"
            )
    return np.array([DETECTION_CLASSES.index(name) for name in class_names], dtype=np.int64)


def labels_of_ids(class_names: Sequence[str]) -> NDArray[np.int64]:
    """Label of each of nuScenes' class ids, (11,): 0 for a class of no name, and at the end for id -1.

    Raises:
        UserError: see `nuscenes_ids`.
    """
    labels = np.zeros(len(DETECTION_CLASSES) + 1, dtype=np.int64)
    labels[nuscenes_ids(class_names)] = np.arange(len(class_names)) + 1
    return labels
