"""Run directories that are compared: what they hold, whether they may be compared, who came from whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import getitem
from os.path import lexists
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.common.arm_names import ROWS
from cpq_train.common.detection_task import DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.file_names import file_name
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.boxes import Floats
from cpq_train.evaluation.matches import Matches, read_matches
from cpq_train.evaluation.metrics_file import UNKNOWN, Document, read_metrics, task_of
from cpq_train.evaluation.run_files import MATCHES_FILE, METRICS_FILE

_MUST_AGREE = (
    ("dataset", "fingerprint"),
    ("dataset", "version"),
    ("dataset", "split"),
    ("dataset", "num_samples"),
)
_POSTPROCESSING = ("postprocessing_sha256",)


@dataclass(frozen=True)
class Run:
    """A scored run.

    Attributes:
        name: its folder's name, or its path where names repeat.
        folder: the run directory.
        metrics: contents of `metrics.json`.
        matches: contents of `matches.npz`, where there is one.
        resampled: scores over resampled scenes, where there are matches of several scenes.
    """

    name: str
    folder: Path
    metrics: Document
    matches: Matches | None
    resampled: bootstrap.Resampled | None

    @cached_property
    def task(self) -> DetectionTask:
        """Classes and rules that it was scored by."""
        return task_of(self.metrics, self.name)

    @property
    def arm(self) -> str:
        """float, float_tuned, ptq, qat, deployed or submission."""
        return str(self.metrics["arm"])

    @property
    def scored_sha256(self) -> str:
        """Of the file that was scored: an engine's own, where one ran, and not that of its checkpoint."""
        return str((self.metrics.get("engine") or self.metrics["checkpoint"])["sha256"])

    @property
    def title(self) -> str:
        """The arm, and the run where its name says more."""
        return self.arm if self.arm == self.name else f"{self.arm} ({self.name})"

    @property
    def file_name(self) -> str:
        """The name as the beginning of a file name."""
        return file_name(self.name.strip("/"))

    def score(self, metric: str) -> float:
        """A score of `metrics.json`, that it has."""
        return float(self.metrics["metrics"][metric])

    def distribution(self, metric: str) -> Floats | None:
        """(B,) mAP or NDS over resampled scenes; the same scenes for every run."""
        if self.resampled is None:
            return None
        return self.resampled.mean_ap if metric == "mAP" else self.resampled.nds


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, in the order of the arms.

    Raises:
        UserError: A run is missing or damaged, or two runs differ in data, split, classes, their order or
            post-processing.
    """
    if not folders:
        raise UserError("no run directory to compare; accepted: one or more folders with a metrics.json")
    documents = [read_metrics(folder / METRICS_FILE) for folder in folders]
    for folder, document in zip(folders, documents, strict=True):
        for key in _MUST_AGREE:
            _check_agreement(key, (folders[0], documents[0]), (folder, document))
        _check_classes((folders[0], documents[0]), (folder, document))
    _check_postprocessing(folders, documents)
    matches = [_matches(folder, document) for folder, document in zip(folders, documents, strict=True)]
    for folder, document, found in zip(folders, documents, matches, strict=True):
        _check_count(folder, document, found)
    _check_samples(folders, matches)
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = [
        Run(name, folder, document, found, _resample(found))
        for name, folder, document, found in zip(names, folders, documents, matches, strict=True)
    ]
    return sorted(runs, key=lambda run: ROWS.index(run.arm))


def _matches(folder: Path, document: Document) -> Matches | None:
    path = folder / MATCHES_FILE
    task = task_of(document, str(folder))
    return read_matches(path, task, _knows_postprocessing(document)) if lexists(path) else None


def relative(run: Run, runs: Sequence[Run], arm: str) -> tuple[Run | None, str]:
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


def postprocessing_of(runs: Sequence[Run]) -> str:
    """The hash of the post-processing that runs have in common, or that none of them knows it."""
    known = (run.metrics["postprocessing_sha256"] for run in runs if _knows_postprocessing(run.metrics))
    return next(known, UNKNOWN)


def _knows_postprocessing(document: Document) -> bool:
    return bool(document["postprocessing_sha256"] != UNKNOWN)


def _check_postprocessing(folders: Sequence[Path], documents: Sequence[Document]) -> None:
    """What is known of it must agree; what made a submission is not."""
    pairs = zip(folders, documents, strict=True)
    known = [(folder, document) for folder, document in pairs if _knows_postprocessing(document)]
    for pair in known[1:]:
        _check_agreement(_POSTPROCESSING, known[0], pair)


def _check_agreement(key: tuple[str, ...], one: tuple[Path, Document], other: tuple[Path, Document]) -> None:
    values = [reduce(getitem, key, document) for _, document in (one, other)]
    if values[0] != values[1]:
        raise _differ(one[0], other[0], ".".join(key), values)


def _check_classes(one: tuple[Path, Document], other: tuple[Path, Document]) -> None:
    """Their order counts: class ids of matches and samples are places in it."""
    tasks = [task_of(document, str(folder)) for folder, document in (one, other)]
    if tasks[0] != tasks[1]:
        are_turned = tasks[0].to_dict() == tasks[1].to_dict()
        said = [list(task.names) if are_turned else task.to_dict() for task in tasks]
        raise _differ(one[0], other[0], "classes", said)


def _differ(one: Path, other: Path, what: str, values: Sequence[Any]) -> UserError:
    return UserError(
        f"{one} and {other} cannot be compared: {what} is {values[0]!r} and {values[1]!r}; "
        "accepted: runs with the same data, split, classes in the same order, and post-processing"
    )


def _check_samples(folders: Sequence[Path], matches: Sequence[Matches | None]) -> None:
    known = [(folder, found) for folder, found in zip(folders, matches, strict=True) if found is not None]
    for folder, found in known[1:]:
        for what, held in (("samples", _samples), ("annotations", _annotations)):
            if held(found) != held(known[0][1]):
                raise UserError(
                    f"{known[0][0]} and {folder} cannot be compared: their {MATCHES_FILE} hold different "
                    f"{what}; accepted: runs that scored the same samples"
                )


def _samples(matches: Matches) -> set[tuple[str, str]]:
    """Tokens, with the names of their scenes."""
    scenes = matches.scene_name[matches.sample_scene].tolist()
    return set(zip(matches.sample_token.tolist(), scenes, strict=True))


def _annotations(matches: Matches) -> set[str]:
    return set(matches.gt_token.tolist())


def _check_count(folder: Path, document: Document, matches: Matches | None) -> None:
    said, found = document["dataset"]["num_samples"], None if matches is None else len(matches.sample_token)
    if found not in (None, said):
        raise UserError(
            f"{folder}: {METRICS_FILE} is of {said} samples, {MATCHES_FILE} of {found}; "
            "accepted: files of one scoring"
        )


def _resample(matches: Matches | None) -> bootstrap.Resampled | None:
    """Resample in the alphabetical order of scenes, so that every run draws the same scenes."""
    if matches is None or len(matches.scene_name) < bootstrap.MIN_SCENES:
        return None
    weights = bootstrap.scene_weights(len(matches.scene_name))
    return bootstrap.resample(matches, weights[:, np.argsort(np.argsort(matches.scene_name))])
