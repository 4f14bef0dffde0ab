"""A submission of whatever detector against the annotations of a data root."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpq_train.common.detection_task import DetectionClass, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import LIDAR_TOP
from cpq_train.common.progress import say
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.selection import Limits, MissingScenes, Selection, SplitNames
from cpq_train.data.sweeps import MAX_NUM_SWEEPS
from cpq_train.evaluation.boxes import GroundTruth, Ints, Predictions
from cpq_train.evaluation.countable import check_countable
from cpq_train.evaluation.ground_truth import ground_truth
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Evaluation, evaluate
from cpq_train.evaluation.run_files import ScoredSplit
from cpq_train.evaluation.submission import read_submission


@dataclass(frozen=True)
class ScoredData:
    """The samples that a submission is scored on; its settings are called as those of `data` in a fit.

    Attributes:
        root: the data root, the folder that holds the version's folder of tables.
        version: name of the folder of tables, such as v1.0-trainval or v1.0-mini.
        val_split: official split ("val" is mini_val in a mini version), or one of `splits.json`.
        classes: the data set's own classes by name, with their rules; null for nuScenes' ten.
        lidar_channel: LiDAR whose key frames say where the ego vehicle was.
        missing_scenes: error, or skip to leave out scenes of which clouds are missing, as the run did whose
            submission this is.
        num_sweeps: LiDAR sweeps per sample that such a run needed.
        cache_dir: where the index is kept; null for the data root, or the user's cache if that is read-only.
    """

    root: str
    version: str = "v1.0-trainval"
    val_split: str = "val"
    classes: dict[str, DetectionClass] | None = None
    lidar_channel: str = LIDAR_TOP
    missing_scenes: MissingScenes = "error"
    num_sweeps: int = MAX_NUM_SWEEPS
    cache_dir: str | None = None

    @property
    def task(self) -> DetectionTask:
        """Classes and rules."""
        return DetectionTask.of(self.classes)

    def selection(self, index: NuScenesIndex) -> Selection:
        """Which of the index's samples are scored."""
        limits = Limits(missing_scenes=self.missing_scenes)
        return Selection(index, SplitNames.only(self.val_split), limits, self.num_sweeps)

    def open(self) -> NuScenesIndex:
        """The index of the data set."""
        return open_index(self.root, self.version, self.cache_dir, self.task, self.lidar_channel)


def score_submission(submission: Path, index: NuScenesIndex, rows: Ints, split: str) -> ScoredSplit:
    """Score a submission as nuscenes-devkit's `DetectionEval` does; says how many boxes each filter left.

    Args:
        submission: the file.
        index: the data set.
        rows: (S,) its samples that are scored.
        split: what they are called.

    Raises:
        UserError: The split holds no sample here or nothing of it counts, the file is no submission for it, a
            box that matches an annotation has a size that is not above 0, or scores of a class are too low.
    """
    annotations = ground_truth(index, rows)
    check_countable(index, rows, annotations, split)
    predictions = read_submission(submission, annotations.samples.tokens, index.task)
    evaluation = evaluate(annotations, predictions)
    _say_counts(annotations, predictions, evaluation.matches)
    _check_matched_sizes(submission, predictions, evaluation.matches)
    _check_scores(submission, evaluation)
    return ScoredSplit(annotations.samples.tokens, predictions, evaluation)


def _say_counts(annotations: GroundTruth, predictions: Predictions, matches: Matches) -> None:
    num_unknown = int(np.isnan(predictions.boxes.velocity).any(axis=1).sum())
    unknown = f"; {num_unknown:,} have no velocity" if num_unknown else ""
    say(
        f"{len(predictions.boxes):,} detections in {len(annotations.samples):,} samples, of which "
        f"{len(matches.pred_row):,} count: inside their class range, outside bicycle racks{unknown}"
    )
    say(
        f"{len(annotations.boxes):,} annotations, of which {len(matches.gt_token):,} count: the same, and "
        "with points inside"
    )


def _check_matched_sizes(submission: Path, predictions: Predictions, matches: Matches) -> None:
    """Where nuscenes-devkit looks at sizes: those of boxes that match nothing do not matter to it."""
    rows = matches.pred_row[matches.is_match.any(axis=0)]
    flat = rows[~(predictions.boxes.size[rows] > 0).all(axis=1)]
    if len(flat):
        token = matches.sample_token[predictions.boxes.sample[flat[0]]]
        size = predictions.boxes.size[flat[0]].tolist()
        raise UserError(
            f"{submission}: sample {token}: size of a detection that matches an annotation is {size}; "
            "accepted: numbers above 0"
        )


def _check_scores(submission: Path, evaluation: Evaluation) -> None:
    """Refuse what nuscenes-devkit does: beyond the last match a curve of scores is 0, and it may not rise."""
    rises = np.diff(evaluation.curves.confidence, axis=2) > 0
    for label in np.flatnonzero(rises.any(axis=(1, 2)))[:1].tolist():
        matches = evaluation.matches
        lowest = matches.pred_score[matches.pred_label == label].min()
        raise UserError(
            f"{submission}: scores of class {matches.task.names[label]} go down to {lowest:g}, and not all "
            "of its annotations are found; accepted: scores of 0 or more"
        )
