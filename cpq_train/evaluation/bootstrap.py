"""Bootstrap intervals over scenes, for one result and for the difference between two.

Frames of one scene resemble each other, so whole scenes are drawn with replacement. A resample weights
every detection and annotation of a scene by how often the scene was drawn; matching is not repeated, for it
never crosses scenes. The score axis of a class is cut at its true positives into at most `MAX_BINS` runs,
in which hits, false alarms and errors are summed per scene; a resample is then one product of its weights
with these sums. With a run for each true positive the mAP of unit weights is that of `metric.scores`; with
fewer runs, and for the true-positive errors, which are interpolated over recall here, the two agree to the
third digit.

Two results of the same samples that are resampled with the same seed are resampled alike, so the difference
between their distributions is the paired one.

Letters in shapes: B resamples, S scenes, K runs, R counted points of the recall grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.boxes import Bools, Floats, Ints
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import average_precision, mean_over_classes, nuscenes_detection_score
from cpq_train.evaluation.protocol import (
    FIRST_RECALL_INDEX,
    RECALL_GRID,
    THRESHOLDS_M,
    TP_THRESHOLD_INDEX,
)

NUM_RESAMPLES = 1000
SEED = 0
MAX_BINS = 512
MIN_SCENES = 2
"""With one scene there is nothing to resample."""

_LEVELS: Floats = RECALL_GRID[FIRST_RECALL_INDEX:]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Resampled:
    """The metric over resampled scenes.

    Attributes:
        class_ap: (C, B) AP of each class.
        mean_ap: (B,) mAP.
        nds: (B,) NDS; None for other classes than nuScenes' ten.
    """

    class_ap: Floats
    mean_ap: Floats
    nds: Floats | None


def interval(distribution: Floats) -> Interval:
    """The 2.5 and 97.5 percentiles of (B,) resampled values."""
    lower, upper = np.percentile(distribution, [2.5, 97.5])
    return float(lower), float(upper)


def scene_weights(num_scenes: int, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Floats:
    """(B, S) how often each scene is drawn in each resample of `num_scenes` draws."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_scenes, np.full(num_scenes, 1 / num_scenes), num_resamples).astype(
        np.float64
    )


def method(num_scenes: int) -> str:
    """How the intervals are made, in words."""
    if num_scenes < MIN_SCENES:
        return f"none: {num_scenes} scene, and the bootstrap resamples scenes"
    return f"95% percentile bootstrap over {num_scenes} scenes, {NUM_RESAMPLES} resamples, seed {SEED}"


def resample(matches: Matches, weights_BS: Floats) -> Resampled:
    """Recompute mAP and NDS for weighted scenes.

    Args:
        matches: what matching found.
        weights_BS: (B, S) weight of each scene of `matches.scene_name`, from `scene_weights`.
    """
    task = matches.task
    weights_BS = np.concatenate([np.ones((1, weights_BS.shape[1])), weights_BS])
    ap = np.zeros((len(task.names), len(THRESHOLDS_M), len(weights_BS)))
    errors = np.ones((len(task.names), len(weights_BS), len(TP_ERRORS)))
    for label in np.unique(matches.gt_label):
        num_gt = weights_BS @ _per_scene(matches, label)
        for threshold in range(len(THRESHOLDS_M)):
            runs = _Runs.of(matches, int(label), threshold)
            if not runs.is_hit.any():
                continue
            curve = _WeightedCurve.of(runs, weights_BS, num_gt)
            ap[label, threshold] = average_precision(curve.precision_on_grid(runs))
            if threshold == TP_THRESHOLD_INDEX:
                errors[label] = curve.mean_errors(runs, weights_BS)
        # What a resample holds no annotation of says nothing: such a class keeps its value over all scenes.
        ap[label, :, num_gt == 0], errors[label, num_gt == 0] = ap[label, :, 0], errors[label, 0]
    mean_ap = ap.mean(axis=(0, 1))
    defined = np.where(task.defined_errors[:, None, :], errors, np.nan)
    nds = nuscenes_detection_score(mean_ap, mean_over_classes(defined)) if task.is_nuscenes else None
    return Resampled(ap.mean(axis=1)[:, 1:], mean_ap[1:], None if nds is None else nds[1:])


def _per_scene(matches: Matches, label: int) -> Ints:
    """(S,) annotations of a class."""
    scene = matches.sample_scene[matches.gt_sample[matches.gt_label == label]]
    return np.bincount(scene, minlength=len(matches.scene_name))


@dataclass(frozen=True)
class _Runs:
    """Detections of one class by falling score, cut into K runs that end at true positives, and the rest."""

    scene: Ints
    is_hit: Bools
    errors: Floats
    run: Ints
    num_runs: int
    num_scenes: int

    @classmethod
    def of(cls, matches: Matches, label: int, threshold: int) -> _Runs:
        start, end = np.searchsorted(matches.pred_label, [label, label + 1])
        is_hit = matches.is_match[threshold, start:end]
        first_error = np.count_nonzero(matches.is_match[:threshold]) + np.count_nonzero(
            matches.is_match[threshold, :start]
        )
        num_hits = np.count_nonzero(is_hit)
        num_runs = min(num_hits, MAX_BINS)
        hits_before = np.cumsum(is_hit) - is_hit
        return cls(
            scene=matches.sample_scene[matches.pred_sample[start:end]],
            is_hit=is_hit,
            errors=matches.match_errors[first_error : first_error + num_hits],
            run=hits_before * num_runs // max(num_hits, 1),
            num_runs=num_runs,
            num_scenes=len(matches.scene_name),
        )

    @property
    def num_hits(self) -> Ints:
        """(K + 1,) true positives of each run, at least 1."""
        return np.maximum(np.bincount(self.run[self.is_hit], minlength=self.num_runs + 1), 1)

    def sums(self, rows: Bools, values: Floats | None = None) -> Floats:
        """(S, K + 1) counts, or sums of values, of the chosen detections by scene and run."""
        cell = self.scene[rows] * (self.num_runs + 1) + self.run[rows]
        size = self.num_scenes * (self.num_runs + 1)
        return np.bincount(cell, values, size).reshape(self.num_scenes, -1).astype(np.float64)


@dataclass(frozen=True)
class _WeightedCurve:
    """Cumulative weighted counts at the runs' ends, and where each recall level falls among them.

    Attributes:
        hits: (B, K + 2) true positives before each run and after the last.
        misses: (B, K + 2) false positives, likewise.
        num_gt: (B,) annotations.
        at: (B, R) run in which the level's recall is passed; K + 1 where it never is.
        is_reached: (B, R) levels up to the highest recall.
    """

    hits: Floats
    misses: Floats
    num_gt: Floats
    at: Ints
    is_reached: Bools

    @classmethod
    def of(cls, runs: _Runs, weights_BS: Floats, num_gt: Floats) -> _WeightedCurve:
        hits = _cumulative(weights_BS @ runs.sums(runs.is_hit))
        misses = _cumulative(weights_BS @ runs.sums(~runs.is_hit))
        wanted = np.floor(_LEVELS * num_gt[:, None] + 1e-9)
        offset = np.arange(len(hits))[:, None] * (hits[:, -1].max() + num_gt.max() + 2)
        passed = np.searchsorted((hits[:, 1:] + offset).ravel(), (wanted + offset).ravel(), side="right")
        at = passed.reshape(wanted.shape) - np.arange(len(hits))[:, None] * (hits.shape[1] - 1)
        is_reached = (_LEVELS * num_gt[:, None] <= hits[:, -1:] + 1e-9) & (hits[:, -1:] > 0)
        return cls(hits, misses, num_gt, np.minimum(at, hits.shape[1] - 1), is_reached)

    def precision_on_grid(self, runs: _Runs) -> Floats:
        """(B, 101) precision at the counted points of the recall grid, 0 at the others.

        It is interpolated from just before a run's first hit, with a share of the run's misses, to its end.
        """
        precision = np.zeros((len(self.hits), len(RECALL_GRID)))
        before, after = self._ends()
        hits_before, hits_after = (np.take_along_axis(self.hits, end, axis=1) for end in (before, after))
        misses_before, misses = (np.take_along_axis(self.misses, end, axis=1) for end in (before, after))
        misses_before = (
            misses_before + (misses - misses_before) / runs.num_hits[np.minimum(before, runs.num_runs)]
        )
        at_end = hits_after / np.maximum(hits_after + misses, 1)
        at_start = np.where(hits_before > 0, hits_before / np.maximum(hits_before + misses_before, 1), at_end)
        level = at_start + self._fraction(hits_before, hits_after) * (at_end - at_start)
        precision[:, FIRST_RECALL_INDEX:] = np.where(self.is_reached, level, 0)
        return precision

    def mean_errors(self, runs: _Runs, weights_BS: Floats) -> Floats:
        """(B, 5) mean of each error's cumulative mean over the recall levels reached; 1 where none is."""
        before, after = self._ends()
        fraction = self._fraction(*(np.take_along_axis(self.hits, end, axis=1) for end in (before, after)))
        num_reached = self.is_reached.sum(axis=1)
        means = np.ones((len(self.hits), len(TP_ERRORS)))
        for column, error in enumerate(runs.errors.T):
            mean = _cumulative_mean(runs, error, weights_BS)
            start, end = (np.take_along_axis(mean, at, axis=1) for at in (np.maximum(before, 1), after))
            total = np.where(self.is_reached, start + fraction * (end - start), 0).sum(axis=1)
            means[:, column] = np.where(num_reached > 0, total / np.maximum(num_reached, 1), 1.0)
        return means

    def _ends(self) -> tuple[Ints, Ints]:
        """Columns of the cumulative sums before and after the run in which each level is passed."""
        after = np.minimum(self.at + 1, self.hits.shape[1] - 1)
        return self.at, after

    def _fraction(self, hits_before: Floats, hits_after: Floats) -> Floats:
        """(B, R) how far into its run each level lies."""
        into = _LEVELS * self.num_gt[:, None] - hits_before
        fraction: Floats = np.clip(into / np.maximum(hits_after - hits_before, 1), 0, 1)
        return fraction


def _cumulative(per_run_BK: Floats) -> Floats:
    """(B, K + 2) sums before each of K + 1 runs and after the last."""
    return np.concatenate([np.zeros((len(per_run_BK), 1)), np.cumsum(per_run_BK, axis=1)], axis=1)


def _cumulative_mean(runs: _Runs, error_M: Floats, weights_BS: Floats) -> Floats:
    """(B, K + 2) weighted mean of the known errors up to each run's end; 1 where a resample knows none."""
    known = ~np.isnan(error_M)
    rows = np.zeros(len(runs.is_hit), bool)
    rows[np.flatnonzero(runs.is_hit)[known]] = True
    total = _cumulative(weights_BS @ runs.sums(rows, error_M[known]))
    count = _cumulative(weights_BS @ runs.sums(rows))
    mean = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    return np.where(count[:, -1:] > 0, mean, 1.0)
