"""The files that scoring leaves in a run directory: `metrics.json`, `results_nusc.json`, `matches.npz`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpq_train.common.files import copy_whole
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Predictions, Strings
from cpq_train.evaluation.devkit import evaluate_with_devkit
from cpq_train.evaluation.matches import write_matches
from cpq_train.evaluation.metric import Evaluation, Scores
from cpq_train.evaluation.metrics_file import Document, RunInfo, build_metrics, write_metrics
from cpq_train.evaluation.submission import write_submission

METRICS_FILE = "metrics.json"
SUBMISSION_FILE = "results_nusc.json"
MATCHES_FILE = "matches.npz"

MetricEngine = Literal["vectorised", "devkit"]
"""Who computes the scores: this package, or nuscenes-devkit, which is slow and agrees to 1e-9."""


class ScoredSplit:
    """Detections of a split and their scores.

    No dataclass: torchmetrics would copy a dataclass field by field on its way out of `Metric.compute`.

    Args:
        sample_tokens: (S,) tokens of the samples.
        predictions: the detections.
        evaluation: their scores and matches.
    """

    def __init__(self, sample_tokens: Strings, predictions: Predictions, evaluation: Evaluation) -> None:
        self.sample_tokens = sample_tokens
        self.predictions = predictions
        self.evaluation = evaluation

    @property
    def scores(self) -> Scores:
        """The scores."""
        return self.evaluation.scores


def write_run(
    run_dir: Path,
    scored: ScoredSplit,
    run: RunInfo,
    index: NuScenesIndex,
    engine: MetricEngine = "vectorised",
    submission: Path | None = None,
) -> Document:
    """Write the files of a scored run; call it on one rank.

    Args:
        run_dir: where to; made if absent.
        scored: detections and scores.
        run: what else `metrics.json` says.
        index: the data set that was scored; the devkit reads its tables.
        engine: who computes AP, errors and NDS of `metrics.json`.
        submission: the file that the detections come from, which is copied; null writes them.

    Returns:
        The contents of `metrics.json`.

    Raises:
        UserError: The detections make no valid submission.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    written = run_dir / SUBMISSION_FILE
    if submission is None:
        write_submission(written, scored.predictions, scored.sample_tokens)
    else:
        copy_whole(submission, written)
    write_matches(run_dir / MATCHES_FILE, scored.evaluation.matches)
    scores = scored.scores
    if engine == "devkit":
        scores = evaluate_with_devkit(index.root, index.version, written, scored.sample_tokens, index.task)
    document = build_metrics(run, scores, scored.evaluation.matches)
    write_metrics(run_dir / METRICS_FILE, document)
    return document
