"""What of a data set's annotations is left for training: where nothing is, that is told before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError, shown
from cpq_train.data.boxes import is_inside
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.labels import labels_of_ids

MIN_LIDAR_POINTS = 1
"""Objects with fewer points are no targets (OpenPCDet's FILTER_MIN_POINTS_IN_GT)."""

_NUM_NAMED = 5
"""Categories that a message names."""


def annotation_rows(index: NuScenesIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows (A,) of the annotations of some samples (S,), sample by sample."""
    counts = np.diff(index.annotation_offsets)[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    found: NDArray[np.int64] = np.repeat(index.annotation_offsets[rows], counts) + within
    return found


def check_targets(
    index: NuScenesIndex,
    rows: NDArray[np.int64],
    class_names: Sequence[str],
    point_cloud_range: Sequence[float],
    split: str,
) -> None:
    """See that a network has something to learn.

    Args:
        index: the data set.
        rows: (S,) the training samples.
        class_names: the network's classes.
        point_cloud_range: minimum x, y, z and maximum x, y, z in metres.
        split: name of the split, for the message.

    Raises:
        UserError: no annotation is a target; says which filter removed how many.
    """
    found = annotation_rows(index, rows)
    num_all = len(found)
    labels = labels_of_ids(class_names, index.task)
    removed: dict[str, int] = {}
    for what, is_kept in (
        (of_other_categories(index), lambda a: labels[index.annotation_classes[a]] > 0),
        ("have no LiDAR point", lambda a: index.annotation_num_lidar_pts[a] >= MIN_LIDAR_POINTS),
        (
            f"lie outside point_cloud_range {list(point_cloud_range)}",
            lambda a: is_inside(index.annotation_boxes[a], point_cloud_range),
        ),
    ):
        kept = found[is_kept(found)]
        removed[what] = len(found) - len(kept)
        found = kept
    if not len(found):
        refuse_none_left(f"training split {split!r}", len(rows), num_all, removed)


def refuse_none_left(what: str, num_samples: int, num_all: int, removed: Mapping[str, int]) -> NoReturn:
    """Say that no annotation is left.

    Args:
        what: the samples, for the message.
        num_samples: how many there are.
        num_all: their annotations.
        removed: what each filter, in turn, has removed.

    Raises:
        UserError: always.
    """
    filters = ", ".join(f"{number} {reason}" for reason, number in removed.items() if number)
    raise UserError(
        f"{what}: of {num_all} annotations in {num_samples} samples none counts"
        f"{f': {filters}' if filters else ''}; accepted: one or more that do"
    )


def of_other_categories(index: NuScenesIndex) -> str:
    """The words for annotations of no class, with the categories of the data set that belong to none."""
    known = index.task.class_of_category
    names = _category_names(index)
    others = [shown(name) for name in names if name not in known]
    listed = ", ".join(others[:_NUM_NAMED]) + (", …" if len(others) > _NUM_NAMED else "")
    return f"are of other classes (categories of no class: {listed or 'none'}; data.classes can name them)"


def _category_names(index: NuScenesIndex) -> list[str]:
    records = read_json(index.root / index.version / "category.json", "table")
    return [record["name"] for record in records]  # checked when the index was built
