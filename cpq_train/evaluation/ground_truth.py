"""Ground truth from the index of a data set."""

from __future__ import annotations

import numpy as np

from cpq_train.common.errors import UserError
from cpq_train.data.census import annotation_rows
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Bools, Boxes, GroundTruth, Ints, Samples


def ground_truth(index: NuScenesIndex, rows: Ints) -> GroundTruth:
    """Annotations of the detection task in the given samples, before any filter.

    Args:
        index: the data set.
        rows: (S,) sample rows of the index, each at most once; their order is the order of the samples.

    Raises:
        UserError: There is no sample, or one occurs twice.
    """
    samples = _samples(index, rows)
    sample = np.repeat(np.arange(len(rows)), np.diff(index.annotation_offsets)[rows])
    annotations = annotation_rows(index, rows)
    is_rack = index.annotation_is_bike_rack[annotations]
    is_object = index.annotation_classes[annotations] >= 0
    objects = annotations[is_object]
    return GroundTruth(
        samples=samples,
        boxes=_boxes(index, annotations, sample, is_object),
        num_points=(index.annotation_num_lidar_pts[objects] + index.annotation_num_radar_pts[objects]).astype(
            np.int64
        ),
        tokens=np.char.decode(index.annotation_tokens[objects], "utf-8"),
        racks=_boxes(index, annotations, sample, is_rack),
        task=index.task,
    )


def _samples(index: NuScenesIndex, rows: Ints) -> Samples:
    if len(rows) == 0 or len(np.unique(rows)) < len(rows):
        raise UserError(
            f"{len(rows)} samples, {len(np.unique(rows))} different ones, to score; accepted: each once"
        )
    scenes, scene = np.unique(index.sample_scenes[rows], return_inverse=True)
    return Samples(
        tokens=np.char.decode(index.sample_tokens[rows], "utf-8"),
        scene=scene.astype(np.int64),
        scene_names=np.char.decode(index.scene_names[scenes], "utf-8"),
        ego_xy=np.asarray(index.sample_ego_translations[rows, :2]),
    )


def _boxes(index: NuScenesIndex, annotations: Ints, sample: Ints, keep: Bools) -> Boxes:
    rows = annotations[keep]
    return Boxes(
        sample=sample[keep],
        label=index.annotation_classes[rows].astype(np.int64),
        translation=index.annotation_translations[rows],
        size=index.annotation_sizes_wlh[rows],
        rotation=index.annotation_rotations[rows],
        velocity=index.annotation_velocities[rows],
        attribute=index.annotation_attributes[rows].astype(np.int64),
    )
