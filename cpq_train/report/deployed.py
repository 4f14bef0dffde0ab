"""What a report says of deployed runs: which engine ran which file, and what that changed."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence

from cpq_train.common.arm_names import DEPLOYED
from cpq_train.evaluation.gaps import compared_metrics
from cpq_train.evaluation.metrics_file import Document
from cpq_train.evaluation.run_files import SUBMISSION_FILE
from cpq_train.report.runs import Run
from cpq_train.report.tables import NONE, Table, code, number

WHAT_IT_SHOWS = (
    "A deployed run is an exported file that an engine ran in the network's place. Its source is the run of "
    "the checkpoint that the file was made of; an exact engine changes nothing of it."
)


def describe_engine(run: Run, runs: Sequence[Run]) -> Document | None:
    """What `report.json` says of the engine of a run; null where PyTorch ran a network.

    Returns:
        "name", "version", "target", "file", "sha256", the title of its "source" among the runs, the
        "change" of each score against that one, and whether the two have "the_same_submission".
    """
    engine = run.metrics.get("engine")
    if run.arm != DEPLOYED or engine is None:
        return None
    source = _source(run, runs)
    metrics = compared_metrics(run.task)
    changes = {name: None if source is None else run.score(name) - source.score(name) for name in metrics}
    return {
        **engine,
        "source": None if source is None else source.title,
        "change": changes,
        "the_same_submission": None if source is None else _have_equal_submissions(run, source),
    }


def _source(run: Run, runs: Sequence[Run]) -> Run | None:
    sha256 = run.metrics["checkpoint"]["sha256"]
    found = (one for one in runs if one.arm != DEPLOYED and one.metrics["checkpoint"]["sha256"] == sha256)
    return next(found, None)


def _have_equal_submissions(run: Run, other: Run) -> bool | None:
    first, second = (one.folder / SUBMISSION_FILE for one in (run, other))
    return filecmp.cmp(first, second, shallow=False) if first.is_file() and second.is_file() else None


def engine_table(report: Document) -> Table:
    """A row for each deployed run."""
    rows = [
        [
            run["title"],
            f"{engine['name']} {engine['version']}",
            code(engine["file"]),
            code(engine["sha256"][:12]),
            engine["source"] or NONE,
            *(number(change, "+.6f") for change in engine["change"].values()),
            {True: "equal", False: "different", None: NONE}[engine["the_same_submission"]],
        ]
        for run in report["runs"]
        if (engine := run["engine"])
    ]
    changes = (f"{name} against it" for name in report["runs"][0]["gap_to_float"])
    header = ["arm", "engine", "file", "SHA-256", "source", *changes, "submissions"]
    return Table("What engines compute", header, rows)
