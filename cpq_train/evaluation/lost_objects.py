"""Objects that float finds and another arm loses, and those it wins: a loss that can be looked at.

An object is found where a detection matches it within 2 m with at least the operating score of its class:
the score at which float's F1 is largest, which is where somebody would run it. The operating score is
float's for all arms, for a network that is swapped into a vehicle keeps the threshold that stands there.

Letters in shapes: N detections, G annotations, C classes.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TextIO

import numpy as np

from cpq_train.common.detection_task import DetectionTask
from cpq_train.common.text import in_cell
from cpq_train.evaluation.boxes import Bools, Floats, Ints, Strings
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.protocol import TP_THRESHOLD_INDEX
from cpq_train.evaluation.ranges import bin_name

POINT_BINS = ((1, 5), (6, 20), (21, 100), (101, None))
"""Bins of the number of points inside an object, both ends included."""

UNMATCHED: Final = float("-inf")
"""In the place of a score: those of other detectors may be 0, or below."""

COLUMNS = (
    "run",
    "change",
    "sample_token",
    "annotation_token",
    "class",
    "range_m",
    "num_points",
    "float_score",
    "score",
)
"""Of the CSV file; a score is empty where nothing matches."""


@dataclass(frozen=True)
class Changes:
    """Annotations that one of two results finds.

    Attributes:
        tokens: (G,) annotation tokens.
        samples: (G,) tokens of their samples.
        labels: (G,) class ids.
        range_m: (G,) distance from the vehicle.
        num_points: (G,) LiDAR and radar points inside.
        float_score: (G,) score of float's match within 2 m, `UNMATCHED` for none.
        score: (G,) likewise of the other arm.
        is_found_by_float: (G,) whether float's score reaches the operating score.
        is_found: (G,) likewise of the other arm.
        task: classes and rules.
    """

    tokens: Strings
    samples: Strings
    labels: Ints
    range_m: Floats
    num_points: Ints
    float_score: Floats
    score: Floats
    is_found_by_float: Bools
    is_found: Bools
    task: DetectionTask

    @property
    def is_lost(self) -> Bools:
        """(G,) found by float alone."""
        return self.is_found_by_float & ~self.is_found

    @property
    def is_won(self) -> Bools:
        """(G,) found by the other arm alone."""
        return self.is_found & ~self.is_found_by_float


def operating_scores(matches: Matches) -> Floats:
    """(C,) score at which a class has its largest F1 over matches within 2 m; infinite where it has none."""
    best = np.full(len(matches.task.names), np.inf)
    num_gt = np.bincount(matches.gt_label, minlength=len(best))
    for label in np.unique(matches.pred_label):
        rows = np.flatnonzero(matches.pred_label == label)
        hits = np.cumsum(matches.is_match[TP_THRESHOLD_INDEX, rows])
        f1 = 2 * hits / (np.arange(1, len(rows) + 1) + num_gt[label])
        if hits[-1]:
            best[label] = matches.pred_score[rows[f1.argmax()]]
    return best


def match_scores(matches: Matches) -> Floats:
    """(G,) score of the detection that matches each annotation within 2 m, `UNMATCHED` for none."""
    found = np.full(len(matches.gt_label), UNMATCHED)
    matched = matches.pred_match[TP_THRESHOLD_INDEX]
    is_hit = matched >= 0
    found[matched[is_hit]] = matches.pred_score[is_hit]
    return found


def changes(baseline: Matches, other: Matches) -> Changes:
    """Compare what two results of the same samples find.

    Args:
        baseline: float's matches, which set the operating scores.
        other: another arm's.
    """
    row_of = {token: row for row, token in enumerate(other.gt_token.tolist())}
    rows = np.array([row_of[token] for token in baseline.gt_token.tolist()], np.int64)
    float_score, score = match_scores(baseline), match_scores(other)[rows]
    needed = operating_scores(baseline)[baseline.gt_label]
    return Changes(
        tokens=baseline.gt_token,
        samples=baseline.sample_token[baseline.gt_sample],
        labels=baseline.gt_label,
        range_m=baseline.gt_range_m,
        num_points=baseline.gt_num_points,
        float_score=float_score,
        score=score,
        is_found_by_float=float_score >= needed,
        is_found=score >= needed,
        task=baseline.task,
    )


Counts = dict[str, dict[str, int]]
"""Group -> {"objects", "found_by_float", "lost", "won"}."""


def counts(found: Changes) -> dict[str, Counts]:
    """Objects lost and won: `{"all" | "class" | "range_m" | "num_points": Counts}`."""
    classes = {name: found.labels == label for label, name in enumerate(found.task.names)}
    ranges = {
        bin_name(low, high): (found.range_m >= low) & (found.range_m < high)
        for low, high in found.task.range_bins_m
    }
    points = {
        f"{low}+" if high is None else f"{low}-{high}": (found.num_points >= low)
        & (found.num_points <= (np.inf if high is None else high))
        for low, high in POINT_BINS
    }
    everything = {"all": np.ones(len(found.labels), bool)}
    groups = {"all": everything, "class": classes, "range_m": ranges, "num_points": points}
    return {name: {key: _count(found, rows) for key, rows in group.items()} for name, group in groups.items()}


def _count(found: Changes, rows: Bools) -> dict[str, int]:
    columns = {
        "objects": rows,
        "found_by_float": found.is_found_by_float,
        "lost": found.is_lost,
        "won": found.is_won,
    }
    return {name: int(np.count_nonzero(column & rows)) for name, column in columns.items()}


def write_changes(file: TextIO, per_run: Mapping[str, Changes]) -> None:
    """Write the lost and won objects of runs as CSV, the surest of float's, or of the arm's, first."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run, found in per_run.items():
        for change, rows, by in (
            ("lost", found.is_lost, found.float_score),
            ("won", found.is_won, found.score),
        ):
            chosen = np.flatnonzero(rows)
            for row in chosen[np.argsort(-by[chosen], kind="stable")].tolist():
                writer.writerow(map(in_cell, [run, change, *_record(found, row)]))


def _record(found: Changes, row: int) -> list[str]:
    scores = (found.float_score[row], found.score[row])
    return [
        str(found.samples[row]),
        str(found.tokens[row]),
        found.task.names[found.labels[row]],
        f"{found.range_m[row]:.2f}",
        str(found.num_points[row]),
        *("" if score == UNMATCHED else f"{score:.4f}" for score in scores),
    ]
