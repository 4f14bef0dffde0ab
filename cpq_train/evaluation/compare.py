"""Arms side by side: one table and one report over run directories.

Runs are only compared where they scored the same samples of the same data with the same post-processing.
The gap to float and the loss of PTQ are paired: both runs are resampled over the same scenes, so what
varies with the scenes alone cancels. This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.errors import UserError
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.bev import BEV_FILE, read_bev_sample
from cpq_train.evaluation.matches import Matches, read_matches
from cpq_train.evaluation.metrics_file import ARMS, Document, read_metrics
from cpq_train.evaluation.plots import draw_bev
from cpq_train.evaluation.report import print_report, write_markdown
from cpq_train.evaluation.run_files import MATCHES_FILE, METRICS_FILE
from cpq_train.files import write_whole

SCHEMA = 1
COMPARED_METRICS = ("mAP", "NDS")

_MUST_AGREE = (
    ("dataset", "fingerprint"),
    ("dataset", "version"),
    ("dataset", "split"),
    ("dataset", "num_samples"),
    ("postprocessing_sha256",),
)


@dataclass(frozen=True)
class _Run:
    name: str
    folder: Path
    metrics: Document
    matches: Matches | None
    resampled: bootstrap.Resampled | None

    @property
    def arm(self) -> str:
        return str(self.metrics["arm"])

    def score(self, metric: str) -> float:
        return float(self.metrics["metrics"][metric])

    def distribution(self, metric: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        if self.resampled is None:
            return None
        return self.resampled.mean_ap if metric == "mAP" else self.resampled.nds


def compare(run_dirs: list[Path], output: Path) -> Document:
    """Compare scored runs: print the table, write `report.md`, `report.json` and the pictures.

    Args:
        run_dirs: run directories with `metrics.json`; `matches.npz` gives paired intervals, `bev_sample.npz`
            and PNG files the pictures.
        output: folder of the report.

    Returns:
        The contents of `report.json`.

    Raises:
        UserError: A run is missing or damaged, or two runs differ in data, split or post-processing.
    """
    runs = _load_runs([Path(folder) for folder in run_dirs])
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    report: Document = {
        "schema": SCHEMA,
        "dataset": runs[0].metrics["dataset"],
        "postprocessing_sha256": runs[0].metrics["postprocessing_sha256"],
        "interval_method": runs[0].metrics["confidence"]["method"],
        "runs": [_describe(run, runs) for run in runs],
        "pictures": _pictures(runs, output),
    }
    write_whole(output / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_markdown(output / "report.md", report)
    print_report(report)
    return report


def share_won_back(baseline: float, ptq: float, tuned: float) -> float | None:
    """Share of the PTQ loss that tuning won back: 1 where it reaches float, negative where it lost more.

    None where PTQ lost nothing.
    """
    loss = baseline - ptq
    return (tuned - ptq) / loss if loss > 0 else None


def _load_runs(folders: list[Path]) -> list[_Run]:
    if not folders:
        raise UserError("no run directory to compare; accepted: one or more folders with a metrics.json")
    documents = [read_metrics(folder / METRICS_FILE) for folder in folders]
    for folder, document in zip(folders, documents, strict=True):
        for key in _MUST_AGREE:
            _check_agreement(key, (folders[0], documents[0]), (folder, document))
    matches = [read_matches(path) if (path := folder / MATCHES_FILE).exists() else None for folder in folders]
    _check_samples(folders, matches)
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = [
        _Run(name, folder, document, found, _resample(found))
        for name, folder, document, found in zip(names, folders, documents, matches, strict=True)
    ]
    return sorted(runs, key=lambda run: ARMS.index(run.arm))


def _check_agreement(key: tuple[str, ...], one: tuple[Path, Document], other: tuple[Path, Document]) -> None:
    values = [_value(document, key) for _, document in (one, other)]
    if values[0] != values[1]:
        raise UserError(
            f"{one[0]} and {other[0]} cannot be compared: "
            f"{'.'.join(key)} is {values[0]!r} and {values[1]!r}; "
            "accepted: runs with the same data, split and post-processing"
        )


def _value(document: Document, key: tuple[str, ...]) -> Any:
    return document[key[0]] if len(key) == 1 else document[key[0]][key[1]]


def _check_samples(folders: list[Path], matches: Sequence[Matches | None]) -> None:
    known = [(folder, found) for folder, found in zip(folders, matches, strict=True) if found is not None]
    for folder, found in known[1:]:
        if set(found.sample_token.tolist()) != set(known[0][1].sample_token.tolist()):
            raise UserError(
                f"{known[0][0]} and {folder} cannot be compared: "
                f"their {MATCHES_FILE} hold different samples; accepted: runs that scored the same samples"
            )


def _resample(matches: Matches | None) -> bootstrap.Resampled | None:
    """Resample in the alphabetical order of scenes, so that every run draws the same scenes."""
    if matches is None or len(matches.scene_name) < bootstrap.MIN_SCENES:
        return None
    weights = bootstrap.scene_weights(len(matches.scene_name))
    return bootstrap.resample(matches, weights[:, np.argsort(np.argsort(matches.scene_name))])


def _describe(run: _Run, runs: list[_Run]) -> Document:
    kept = ("arm", "checkpoint", "metrics", "confidence", "per_class", "per_range", "coverage", "profile")
    baseline, no_baseline = _relative(run, runs, "float")
    return {
        "name": run.name,
        "folder": str(run.folder),
        **{key: run.metrics[key] for key in kept},
        "gap_to_float": {metric: _gap(run, baseline, no_baseline, metric) for metric in COMPARED_METRICS},
        "ptq_loss_won_back": {metric: _won_back(run, runs, metric) for metric in COMPARED_METRICS},
    }


def _relative(run: _Run, runs: list[_Run], arm: str) -> tuple[_Run | None, str]:
    """The run of an arm that a run came from, or why there is none: its parent, else the only one."""
    candidates = [other for other in runs if other.arm == arm]
    parent = run.metrics["parents"].get(arm)
    parents = [other for other in candidates if other.metrics["checkpoint"]["sha256"] == parent]
    if run.arm == arm:
        return run, ""
    if len(parents) == 1 or len(candidates) == 1:
        return (parents or candidates)[0], ""
    if not candidates:
        return None, f"no {arm} run among those compared"
    return None, f"{len(candidates)} {arm} runs, and none or several of them are the parent of {run.name}"


def _difference(run: _Run, other: _Run, metric: str) -> bootstrap.Interval | None:
    """Paired interval of the score of `run` minus that of `other`."""
    ours, theirs = run.distribution(metric), other.distribution(metric)
    return None if ours is None or theirs is None else bootstrap.interval(ours - theirs)


def _gap(run: _Run, baseline: _Run | None, reason: str, metric: str) -> Document:
    if baseline is None or baseline is run:
        return {"value": None, "interval": None, "reason": reason or "the baseline itself"}
    interval = _difference(run, baseline, metric)
    return {
        "value": run.score(metric) - baseline.score(metric),
        "interval": None if interval is None else list(interval),
        "reason": None,
    }


def _won_back(run: _Run, runs: list[_Run], metric: str) -> Document:
    """Share of the PTQ loss that a tuned run won back, or why it has no meaning."""
    (baseline, no_baseline), (ptq, no_ptq) = _relative(run, runs, "float"), _relative(run, runs, "ptq")
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


def _pictures(runs: list[_Run], output: Path) -> list[str]:
    """Draw the sample that runs share, float beside the last arm, and copy the pictures that runs bring."""
    folder = output / "pictures"
    names = []
    samples = {run.name: read_bev_sample(path) for run in runs if (path := run.folder / BEV_FILE).exists()}
    tokens = {sample.token for sample in samples.values()}
    for token in sorted(tokens):
        shown = [(name, sample) for name, sample in samples.items() if sample.token == token]
        draw_bev(folder / f"bev_{token}.png", dict([shown[0], shown[-1]]))
        names.append(f"pictures/bev_{token}.png")
    for run in runs:
        for picture in sorted(run.folder.glob("*.png")):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{Path(run.name).name}_{picture.name}"
            shutil.copyfile(picture, folder / name)
            names.append(f"pictures/{name}")
    return names
