"""Arms side by side: one table and one report over run directories.

Runs are only compared where they scored the same samples of the same data with the same post-processing.
The gap to float and the loss of PTQ are paired: both runs are resampled over the same scenes, so what
varies with the scenes alone cancels. This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os.path import lexists
from pathlib import Path

from cpq_train.common.errors import CheckFailed
from cpq_train.common.files import check_writable, replacing, write_whole
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.gaps import compared_metrics, share_won_back
from cpq_train.evaluation.lost_objects import Changes, changes, counts, write_changes
from cpq_train.evaluation.metrics_file import Document
from cpq_train.evaluation.ranges import errors_per_range
from cpq_train.evaluation.reliability import reliability, scores_are_chances
from cpq_train.profiling.latency_file import read_latency
from cpq_train.report.amax_history import AMAX_DRIFT_FILE, last_of_most_moved, read_amax_history
from cpq_train.report.checks import check, read_expression
from cpq_train.report.costs import describe_costs
from cpq_train.report.deployed import describe_engine
from cpq_train.report.figures import draw_figures
from cpq_train.report.page import write_page
from cpq_train.report.runs import Run, load_runs, postprocessing_of, relative
from cpq_train.report.text import print_report, write_markdown
from cpq_train.report.training_costs import describe_training_cost
from cpq_train.report.wandb_report import log_report

SCHEMA = 1
LOST_OBJECTS_FILE = "lost_objects.csv"
NUM_LISTED_QUANTIZERS = 10

_KEPT = (
    *("arm", "checkpoint", "dataset", "postprocessing_sha256", "metrics", "confidence"),
    *("per_class", "per_range", "coverage"),
)
"""What a report says of a run as its `metrics.json` does."""


def compare(
    run_dirs: list[Path],
    output: Path,
    wandb: str | None = None,
    latency: Path | None = None,
    fail_if: list[str] | None = None,
) -> Document:
    """Compare scored runs: print the tables, write the report.

    Writes `report.html` (one page with all pictures inside), `report.md` and its `pictures/`, `report.json`,
    and `lost_objects.csv` where there is a float run to lose against.

    Args:
        run_dirs: run directories with `metrics.json`. Where they have them, `matches.npz` gives paired
            intervals, curves, calibration and lost objects, `bev_sample.npz` the pictures from above,
            `amax_drift.csv` and `sensitivity.json` with its picture what became of the quantizers,
            `layer_latency.csv`, `layer_memory.csv` and `throughput.csv` what training cost.
        output: folder of the report.
        wandb: W&B project to log the report to; null logs nothing.
        latency: `latency.json` of `profile`, for a table of times that were measured in turn. Its rows belong
            to the runs that scored the same file.
        fail_if: what no score may be, such as "mAP<float-0.01", "qat.NDS<float-0.005", "AP:*<float-0.05" or
            "mAVE>0.4"; exit code 1, behind the report, where one is.

    Returns:
        The contents of `report.json`.

    Raises:
        UserError: A run or the latency file is missing or damaged, two runs differ in data, split or
            post-processing, or `fail_if` is not readable or names what is not there.
        CheckFailed: A score is what `fail_if` says; the report is written.
    """
    expressions = [read_expression(text) for text in fail_if or ()]
    output = Path(output)
    check_writable(output, "output")
    runs = load_runs([Path(folder) for folder in run_dirs])
    checks = [one for expression in expressions for one in check(expression, runs)]
    times = None if latency is None else read_latency(Path(latency))
    report = _write(runs, times, checks, output)
    print_report(report)
    if wandb is not None:
        log_report(output, report, wandb)
    if failed := [one for one in checks if one["failed"]]:
        raise CheckFailed(f"{len(failed)} of {len(checks)} checks failed")
    return report


def _write(runs: Sequence[Run], times: Document | None, checks: list[Document], output: Path) -> Document:
    """Write the report; returns the contents of `report.json`."""
    output.mkdir(parents=True, exist_ok=True)
    changed = _changes(runs)
    report: Document = {
        "schema": SCHEMA,
        "dataset": runs[0].metrics["dataset"],
        "postprocessing_sha256": postprocessing_of(runs),
        "interval_method": runs[0].metrics["confidence"]["method"],
        "latency": times,
        "runs": [_describe(run, runs, changed.get(run.name), times) for run in runs],
        "checks": checks,
        "pictures": draw_figures(runs, changed, output),
    }
    write_whole(output / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    if changed:
        _write_lost_objects(output / LOST_OBJECTS_FILE, changed)
    write_markdown(output / "report.md", report)
    write_page(output / "report.html", report)
    return report


def _changes(runs: Sequence[Run]) -> dict[str, Changes]:
    """Run name -> what it finds and loses against the float run it came from, where both have matches."""
    found = {}
    for run in runs:
        baseline, _ = relative(run, runs, "float")
        known = baseline is not None and baseline.matches is not None and run.matches is not None
        if known and baseline is not run:
            assert baseline is not None
            assert baseline.matches is not None
            assert run.matches is not None
            found[run.name] = changes(baseline.matches, run.matches)
    return found


def _write_lost_objects(path: Path, changed: dict[str, Changes]) -> None:
    with (
        replacing(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        write_changes(file, changed)


def _describe(run: Run, runs: Sequence[Run], changed: Changes | None, latency: Document | None) -> Document:
    baseline, no_baseline = relative(run, runs, "float")
    metrics = compared_metrics(run.task)
    return {
        "name": run.name,
        "title": run.title,
        "folder": str(run.folder),
        **{key: run.metrics[key] for key in _KEPT},
        "trained": run.metrics.get("trained"),
        **describe_costs(run, baseline, latency),
        "engine": describe_engine(run, runs),
        "errors_per_range": None if run.matches is None else errors_per_range(run.matches),
        "reliability": _reliability(run),
        "lost_objects": None if changed is None else counts(changed),
        "amax_drift": _amax_drift(run.folder / AMAX_DRIFT_FILE),
        "training_cost": describe_training_cost(run.folder),
        "gap_to_float": {metric: _gap(run, baseline, no_baseline, metric) for metric in metrics},
        "ptq_loss_won_back": {metric: _won_back(run, runs, metric) for metric in metrics},
    }


def _reliability(run: Run) -> Document | None:
    if run.matches is None or not scores_are_chances(run.matches):
        return None
    return reliability(run.matches).to_document()


def _amax_drift(path: Path) -> Document | None:
    return last_of_most_moved(read_amax_history(path), NUM_LISTED_QUANTIZERS) if lexists(path) else None


def _difference(run: Run, other: Run, metric: str) -> bootstrap.Interval | None:
    """Paired interval of the score of `run` minus that of `other`."""
    ours, theirs = run.distribution(metric), other.distribution(metric)
    return None if ours is None or theirs is None else bootstrap.interval(ours - theirs)


def _gap(run: Run, baseline: Run | None, reason: str, metric: str) -> Document:
    if baseline is None or baseline is run:
        return {"value": None, "interval": None, "reason": reason or "the baseline itself"}
    interval = _difference(run, baseline, metric)
    return {
        "value": run.score(metric) - baseline.score(metric),
        "interval": None if interval is None else list(interval),
        "reason": None,
    }


def _won_back(run: Run, runs: Sequence[Run], metric: str) -> Document:
    """Share of the PTQ loss that a tuned run won back, or why it has no meaning."""
    (baseline, no_baseline), (ptq, no_ptq) = relative(run, runs, "float"), relative(run, runs, "ptq")
    if run.arm != "qat" or baseline is None or ptq is None:
        reason = "only for the qat arm" if run.arm != "qat" else no_baseline or no_ptq
        return {"value": None, "reason": reason}
    share = share_won_back(baseline.score(metric), ptq.score(metric), run.score(metric))
    loss = baseline.score(metric) - ptq.score(metric)
    if share is None:
        return {"value": None, "reason": f"PTQ lost no {metric} ({-loss:+.4f})"}
    interval = _difference(baseline, ptq, metric)
    if interval is not None and interval[0] <= 0 <= interval[1]:
        spread = f"[{interval[0]:.4f}, {interval[1]:.4f}]"
        return {
            "value": None,
            "reason": f"the PTQ loss of {loss:.4f} has the 95% interval {spread} with 0 inside",
        }
    return {
        "value": share,
        "reason": None if interval else "no interval: a run has no matches or one scene only",
    }
