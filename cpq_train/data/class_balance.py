"""CBGS: the samples of an epoch drawn so that rare classes come up as often as frequent ones.

Zhu et al. 2019, "Class-balanced Grouping and Sampling for Point Cloud 3D Object Detection", by the rule of
OpenPCDet's BALANCED_RESAMPLING.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.index import NuScenesIndex

Rows = NDArray[np.int64]


def class_balanced_rows(
    index: NuScenesIndex, rows: Rows, seed: int, class_names: Sequence[str] = DETECTION_CLASSES
) -> Rows:
    """Draws training samples anew, class by class.

    Let D be the sum over classes of the number of samples that show the class. Every class gives as much
    of D as any other, drawn with replacement from the samples that show it; a class that none shows gives
    none. Drawn once for a training, not for each epoch.

    Args:
        index: the data set.
        rows: (S,) the samples of the split.
        seed: of the draws.
        class_names: the network's classes; their order does not matter.

    Returns:
        Some of `rows`, many of them several times.

    Raises:
        UserError: no class gives a sample.
    """
    rng = np.random.default_rng(seed)
    presence = class_presence(index, rows)[:, [name in class_names for name in index.task.names]]
    numbers = num_draws(presence.sum(axis=0).tolist())
    if not any(numbers):
        raise UserError(
            f"data.class_balanced: the classes that {len(rows)} training samples show add up to "
            f"{int(presence.sum())}: expected {len(class_names)} or more"
        )
    drawn = [
        rng.choice(rows[presence[:, class_id]], number) for class_id, number in enumerate(numbers) if number
    ]
    return np.concatenate(drawn)


def class_presence(index: NuScenesIndex, rows: Rows) -> NDArray[np.bool_]:
    """Whether samples (S,) show each class of the task, (S, classes).

    An annotation with LiDAR or radar points will do, as in OpenPCDet's info files; the stricter filter of
    the targets comes later.
    """
    has_points = index.annotation_num_lidar_pts[:] + index.annotation_num_radar_pts[:] > 0
    counted = np.flatnonzero(has_points & (index.annotation_classes[:] >= 0))
    samples = np.repeat(np.arange(len(index)), np.diff(index.annotation_offsets))
    presence = np.zeros((len(index), len(index.task.names)), dtype=np.bool_)
    presence[samples[counted], index.annotation_classes[counted]] = True
    return presence[rows]


def num_draws(frames: list[int]) -> list[int]:
    """How often each class is drawn, given the number of frames that show it.

    In OpenPCDet's floating-point steps, which decide where the tenth is no whole number.
    """
    total = sum(frames)
    share = 1.0 / len(frames)
    return [int(count * (share / (count / total))) if count else 0 for count in frames]
