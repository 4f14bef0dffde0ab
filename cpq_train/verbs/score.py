"""`score`: the scores of any submission, as a run folder that `compare` takes. Starts without torch."""

from __future__ import annotations

from pathlib import Path

from cpq_train.common.arm_names import SUBMISSION, Row
from cpq_train.common.console import print_plain
from cpq_train.common.files import check_regular, check_writable, sha256_of
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation.devkit import check_devkit
from cpq_train.evaluation.gaps import NO_NDS
from cpq_train.evaluation.metrics_file import UNKNOWN, Document, RunInfo
from cpq_train.evaluation.run_files import MetricEngine, write_run
from cpq_train.evaluation.scored_data import ScoredData, score_submission
from cpq_train.report.sections import scores_table
from cpq_train.report.tables import Table, number
from cpq_train.report.text import as_rich


def score(
    submission: Path,
    data: ScoredData,
    output: Path,
    arm: Row = SUBMISSION,
    engine: MetricEngine = "vectorised",
) -> Document:
    """Score the detections of whatever detector against the annotations of a data root.

    Writes `metrics.json`, `matches.npz` and the submission itself, as `results_nusc.json`, into a folder that
    `compare` takes as an arm. How its boxes came about is unknown, and `compare` says so.

    Args:
        submission: a file in the form of nuScenes' detection task, such as any detector's results_nusc.json.
        data: the samples that it is scored on.
        output: the run folder.
        arm: which row of a comparison it stands for.
        engine: who computes the numbers of `metrics.json`: vectorised (this project) or devkit
            (nuscenes-devkit).

    Returns:
        The contents of `metrics.json`.

    Raises:
        UserError: The data root or the submission is missing or damaged, or they do not belong together.
    """
    check_writable(output, "output")
    check_regular(submission, "submission")
    index = data.open()
    if engine == "devkit":
        check_devkit(index)
    selection = data.selection(index)
    scored = score_submission(submission, index, selection.val_rows, data.val_split)
    skipped = selection.skipped(data.val_split)
    run = RunInfo(
        arm=arm,
        checkpoint_path=str(submission),
        checkpoint_sha256=sha256_of(submission),
        dataset={**index.dataset_info(), **({"skipped_scenes": skipped} if skipped else {})},
        split=data.val_split,
        postprocessing_sha256=UNKNOWN,
    )
    document = write_run(output, scored, run, index, engine, submission)
    print_plain(as_rich(scores_table({"runs": [{"title": arm, **document}]})), as_rich(_per_class(document)))
    if not data.task.is_nuscenes:
        print_plain(NO_NDS)
    return document


def _per_class(document: Document) -> Table:
    rows = [
        [name, number(of_class["AP"]["mean"]), *(number(of_class[error]) for error in TP_ERRORS)]
        for name, of_class in document["per_class"].items()
    ]
    return Table("Classes", ["class", "AP", *TP_ERRORS], rows)
