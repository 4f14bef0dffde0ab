"""The boxes that count: class range, points inside, bicycle racks (nuscenes-devkit, `filter_eval_boxes`)."""

from __future__ import annotations

import numpy as np

from cpq_train.common.detection_task import DetectionTask
from cpq_train.data.boxes import rotation_matrices
from cpq_train.evaluation.boxes import Bools, Boxes, Floats, GroundTruth, Predictions, Samples


def ego_distance(boxes: Boxes, samples: Samples) -> Floats:
    """(N,) distance of each box centre from the ego vehicle in the x-y plane, m."""
    offset: Floats = boxes.translation[:, :2] - samples.ego_xy[boxes.sample]
    distance: Floats = np.sqrt(np.sum(offset**2, axis=1))
    return distance


def counts_as_ground_truth(ground_truth: GroundTruth) -> Bools:
    """(N,) annotations inside their class range, with at least one point, outside bicycle racks."""
    boxes = ground_truth.boxes
    has_points: Bools = ground_truth.num_points != 0
    task = ground_truth.task
    in_range = _within_class_range(boxes, ground_truth.samples, task)
    return has_points & in_range & ~_in_bike_rack(boxes, ground_truth.racks, task)


def counts_as_detection(predictions: Predictions, ground_truth: GroundTruth) -> Bools:
    """(N,) detections inside their class range, outside bicycle racks."""
    boxes, task = predictions.boxes, ground_truth.task
    in_range = _within_class_range(boxes, ground_truth.samples, task)
    return in_range & ~_in_bike_rack(boxes, ground_truth.racks, task)


def _within_class_range(boxes: Boxes, samples: Samples, task: DetectionTask) -> Bools:
    inside: Bools = ego_distance(boxes, samples) < task.ranges_m[boxes.label]
    return inside


def _in_bike_rack(boxes: Boxes, racks: Boxes, task: DetectionTask) -> Bools:
    inside = np.zeros(len(boxes), bool)
    labels = [label for label, rules in enumerate(task.rules) if rules.is_ignored_in_racks]
    cycles = np.flatnonzero(np.isin(boxes.label, labels))
    cycles = cycles[np.argsort(boxes.sample[cycles])]
    first = np.searchsorted(boxes.sample[cycles], racks.sample, side="left")
    last = np.searchsorted(boxes.sample[cycles], racks.sample, side="right")
    for rack, (start, end) in enumerate(zip(first, last, strict=True)):
        near = cycles[start:end]
        inside[near] |= _points_in_box(boxes.translation[near], racks, rack)
    return inside


def _points_in_box(points_N3: Floats, boxes: Boxes, row: int) -> Bools:
    """Which points lie in a box, its faces included, measured along its edges from one corner."""
    width, length, height = boxes.size[row]
    axes = rotation_matrices(boxes.rotation[row])
    edges = -axes * np.array([length, width, height])
    corner = boxes.translation[row] - edges.sum(axis=1) / 2
    along = (points_N3 - corner) @ edges
    inside: Bools = np.all((along >= 0) & (along <= np.sum(edges**2, axis=0)), axis=1)
    return inside
