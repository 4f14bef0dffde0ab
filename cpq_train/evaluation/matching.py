"""Greedy matching of detections to ground truth, all classes, samples and thresholds at once.

nuscenes-devkit walks over the detections of a class by falling score (of equal scores the later box first)
and gives each the nearest annotation of its sample and class that is still free (of equal distances the
earlier annotation), if that is closer than the threshold. Detections of different samples or classes do not
compete, so here the first detections of all (sample, class) groups are matched together, then the second
ones, and so on.

Letters in shapes: N detections, G annotations, T thresholds, P candidate pairs, M matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpq_train.common.detection_task import MAX_NUM_CLASSES, NUSCENES, DetectionTask
from cpq_train.evaluation.boxes import Bools, Boxes, Floats, Ints
from cpq_train.evaluation.protocol import THRESHOLDS_M

_PAIRS_PER_CHUNK = 4_000_000


def devkit_order(label: Ints, score: Floats) -> Ints:
    """(N,) rows by class, then falling score, then falling row: the order in which detections are matched."""
    order: Ints = np.lexsort((-np.arange(len(score)), -score, label))
    return order


def match(ground_truth: Boxes, predictions: Boxes) -> Ints:
    """Match detections, given in `devkit_order`, to annotations.

    Args:
        ground_truth: G annotations.
        predictions: N detections.

    Returns:
        (T, N) row of the annotation that each detection matches at each threshold, -1 for a false positive.
    """
    matched = np.full((len(THRESHOLDS_M), len(predictions)), -1, np.int64)
    taken = np.zeros((len(THRESHOLDS_M), len(ground_truth)), bool)
    thresholds = np.array(THRESHOLDS_M)[:, None]
    for candidates in _rounds(_candidates(ground_truth, predictions), predictions):
        starts = np.flatnonzero(np.diff(candidates.prediction, prepend=-1))
        distances = np.where(taken[:, candidates.ground_truth], np.inf, candidates.distance)
        nearest = _first_minimum(distances, starts)
        is_match = np.take_along_axis(distances, nearest, axis=1) < thresholds
        threshold, row = np.nonzero(is_match)
        chosen = candidates.ground_truth[nearest[threshold, row]]
        taken[threshold, chosen] = True
        matched[threshold, candidates.prediction[starts][row]] = chosen
    return matched


@dataclass(frozen=True)
class _Candidates:
    """P pairs of one sample and class closer than the largest threshold, by detection, then by annotation."""

    prediction: Ints
    ground_truth: Ints
    distance: Floats

    def __getitem__(self, rows: Ints | Bools | slice) -> _Candidates:
        return _Candidates(self.prediction[rows], self.ground_truth[rows], self.distance[rows])


def _first_minimum(values_TP: Floats, starts: Ints) -> Ints:
    """(T, groups) column of the first smallest value in each run of columns that begins at `starts`."""
    lengths = np.diff(starts, append=values_TP.shape[1])
    minima = np.repeat(np.minimum.reduceat(values_TP, starts, axis=1), lengths, axis=1)
    columns = np.where(values_TP == minima, np.arange(values_TP.shape[1]), values_TP.shape[1])
    return np.minimum.reduceat(columns, starts, axis=1)


def _group(boxes: Boxes) -> Ints:
    return boxes.sample * MAX_NUM_CLASSES + boxes.label


def _candidates(ground_truth: Boxes, predictions: Boxes) -> _Candidates:
    gt_group, group = _group(ground_truth), _group(predictions)
    by_group = np.argsort(gt_group, kind="stable")
    size = np.bincount(gt_group, minlength=group.max(initial=0) + 1)
    first, count = (np.cumsum(size) - size)[group], size[group]
    gt_xy, xy = (np.ascontiguousarray(boxes.translation[:, :2].T) for boxes in (ground_truth, predictions))
    chunks = [
        _close_pairs(rows, first[rows], count[rows], by_group, gt_xy, xy[:, rows]) for rows in _chunks(count)
    ]
    names = _Candidates.__dataclass_fields__
    return _Candidates(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names))


def _chunks(count: Ints) -> list[Ints]:
    """Rows with annotations in their group, cut so that a chunk makes about `_PAIRS_PER_CHUNK` pairs."""
    rows = np.flatnonzero(count)
    chunk = np.cumsum(count[rows]) // _PAIRS_PER_CHUNK
    return np.split(rows, np.flatnonzero(np.diff(chunk)) + 1)


def _close_pairs(
    rows: Ints, first: Ints, count: Ints, by_group: Ints, gt_xy_2G: Floats, xy_2N: Floats
) -> _Candidates:
    prediction = np.repeat(rows, count)
    within = np.arange(len(prediction)) - np.repeat(np.cumsum(count) - count, count)
    annotation = by_group[np.repeat(first, count) + within]
    offset_x, offset_y = (
        np.repeat(of_prediction, count) - of_annotation[annotation]
        for of_prediction, of_annotation in zip(xy_2N, gt_xy_2G, strict=True)
    )
    distance = np.sqrt(offset_x**2 + offset_y**2)
    close = distance < max(THRESHOLDS_M)
    return _Candidates(prediction[close], annotation[close], distance[close])


def _rounds(candidates: _Candidates, predictions: Boxes) -> Iterator[_Candidates]:
    """Candidates of the first detection of every group, then of the second ones, and so on."""
    rows, pairs = np.unique(candidates.prediction, return_counts=True)
    group = _group(predictions)[rows]
    by_group = np.argsort(group, kind="stable")
    rank = np.empty_like(rows)
    sorted_group = group[by_group]
    rank[by_group] = np.arange(len(rows)) - np.searchsorted(sorted_group, sorted_group, side="left")
    round_of_pair = np.repeat(rank, pairs)
    by_round = np.argsort(round_of_pair, kind="stable")
    ends = np.cumsum(np.bincount(round_of_pair))
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True) if len(rows) else ():
        yield candidates[by_round[start:end]]


def true_positive_errors(ground_truth: Boxes, predictions: Boxes, task: DetectionTask = NUSCENES) -> Floats:
    """Errors of M matched pairs of equal class, in the order of `TP_ERRORS`.

    Args:
        ground_truth: M annotations.
        predictions: M detections.
        task: classes and rules.

    Returns:
        (M, 5) translation (m), scale (1 - IoU of the aligned boxes), orientation (rad; modulo half a turn for
        what is symmetric, such as barriers), velocity (m/s; NaN where unknown) and attribute error (0 or 1;
        NaN where there is none).
    """
    offset = predictions.translation[:, :2] - ground_truth.translation[:, :2]
    velocity = predictions.velocity - ground_truth.velocity
    wrong = (ground_truth.attribute != predictions.attribute).astype(float)
    return np.stack(
        [
            np.hypot(offset[:, 0], offset[:, 1]),
            1 - _scale_iou(ground_truth.size, predictions.size),
            _yaw_difference(ground_truth, predictions, task),
            np.hypot(velocity[:, 0], velocity[:, 1]),
            np.where(ground_truth.attribute < 0, np.nan, wrong),
        ],
        axis=1,
    )


def _scale_iou(size_a_M3: Floats, size_b_M3: Floats) -> Floats:
    intersection = np.prod(np.minimum(size_a_M3, size_b_M3), axis=1)
    iou: Floats = intersection / (np.prod(size_a_M3, axis=1) + np.prod(size_b_M3, axis=1) - intersection)
    return iou


def _yaw_difference(ground_truth: Boxes, predictions: Boxes, task: DetectionTask) -> Floats:
    is_symmetric = np.array([rules.is_symmetric for rules in task.rules])
    period = np.where(is_symmetric[ground_truth.label], np.pi, 2 * np.pi)
    difference: Floats = (ground_truth.yaw - predictions.yaw + period / 2) % period - period / 2
    return np.abs(difference)
