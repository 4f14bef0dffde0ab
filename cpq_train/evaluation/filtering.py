"""The boxes that count: class range, points inside, bicycle racks (nuscenes-devkit, `filter_eval_boxes`)."""

from __future__ import annotations

import numpy as np

from cpq_train.data.boxes import rotation_matrices
from cpq_train.evaluation.boxes import Bools, Boxes, Floats, GroundTruth, Predictions, Samples
from cpq_train.evaluation.protocol import BIKE_RACK_CLASSES, CLASS_RANGES_M
from cpq_train.nuscenes import DETECTION_CLASSES


def ego_distance(boxes: Boxes, samples: Samples) -> Floats:
    """(N,) distance of each box centre from the ego vehicle in the x-y plane, m."""
    offset: Floats = boxes.translation[:, :2] - samples.ego_xy[boxes.sample]
    distance: Floats = np.sqrt(np.sum(offset**2, axis=1))
    return distance


def filter_ground_truth(ground_truth: GroundTruth) -> GroundTruth:
    """Keep annotations inside their class range, with at least one point, outside bicycle racks."""
    keep = _within_class_range(ground_truth.boxes, ground_truth.samples) & (ground_truth.num_points != 0)
    kept = ground_truth[keep]
    return kept[~_in_bike_rack(kept.boxes, kept.racks)]


def filter_predictions(predictions: Predictions, ground_truth: GroundTruth) -> tuple[Predictions, Bools]:
    """Keep detections inside their class range and outside bicycle racks.

    Returns:
        The detections kept, and the (N,) mask of which they are.
    """
    boxes = predictions.boxes
    keep = _within_class_range(boxes, ground_truth.samples)
    keep[keep] = ~_in_bike_rack(boxes[keep], ground_truth.racks)
    return predictions[keep], keep


def _within_class_range(boxes: Boxes, samples: Samples) -> Bools:
    inside: Bools = ego_distance(boxes, samples) < CLASS_RANGES_M[boxes.label]
    return inside


def _in_bike_rack(boxes: Boxes, racks: Boxes) -> Bools:
    inside = np.zeros(len(boxes), bool)
    cycles = np.flatnonzero(
        np.isin(boxes.label, [DETECTION_CLASSES.index(name) for name in BIKE_RACK_CLASSES])
    )
    cycles = cycles[np.isin(boxes.sample[cycles], racks.sample)]
    for rack in range(len(racks)):
        near = cycles[boxes.sample[cycles] == racks.sample[rack]]
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
