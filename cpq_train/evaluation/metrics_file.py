"""`metrics.json`: what a run scored, on what, and how; the file that `compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import NotRequired

from cpq_train.common.arm_names import Row
from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.documents import read_json, sealed, unsealed
from cpq_train.common.files import write_whole
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.common.schema import Count, CountAboveZero, accepts, check_document, keys
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Scores
from cpq_train.evaluation.protocol import THRESHOLDS_M
from cpq_train.evaluation.ranges import bin_name, classes_that_reach, errors_per_range, scores_per_range

SCHEMA = 1
UNKNOWN: Final = "unknown"
"""In the place of the hash of the post-processing, where a submission was scored."""

METRICS = ("mAP", "NDS", *(f"m{error}" for error in TP_ERRORS))

Document = dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What `metrics.json` says beside the scores.

    Attributes:
        arm: "float", "float_tuned", "ptq", "qat", "deployed" for an exported file that an engine runs, or
            "submission" for detections of whatever detector.
        checkpoint_path: the checkpoint scored, or the one that the file was made of; or the submission.
        checkpoint_sha256: its hash.
        dataset: "root_name", "version" and "fingerprint", as the index gives them; where it is so, another
            "lidar_channel", "skipped_scenes", "num_bad_sweeps", and the splits of a training on several,
            "trained_on".
        split: name of the split scored.
        postprocessing_sha256: hash of the post-processing settings; runs that differ in it are not compared.
            `UNKNOWN` for a submission, which is compared with any.
        parents: arm to sha256 of the checkpoints this one came from.
        coverage: kind of layer to [quantized, all].
        profile: measurements of size, latency and memory.
        config: the settings of the run.
        trained_classes: the classes that the network was made for; None where nobody says.
        engine: "name" and "version" of the engine, "file", "sha256" and "target" of what it ran; empty where
            PyTorch ran a network.
    """

    arm: str
    checkpoint_path: str
    checkpoint_sha256: str
    dataset: Mapping[str, Any]
    split: str
    postprocessing_sha256: str
    parents: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    trained_classes: Sequence[str] | None = None
    engine: Mapping[str, str] = field(default_factory=dict)


def build_metrics(run: RunInfo, scores: Scores, matches: Matches) -> Document:
    """The contents of `metrics.json`, with bootstrap intervals and AP per range."""
    task, trained = scores.task, set(run.trained_classes or scores.task.names)
    resampled = _resample(matches)
    return {
        "schema": SCHEMA,
        "arm": run.arm,
        "checkpoint": {"path": run.checkpoint_path, "sha256": run.checkpoint_sha256},
        "dataset": {**run.dataset, "split": run.split, "num_samples": len(matches.sample_token)},
        **({} if task == NUSCENES else {"classes": task.to_dict()}),
        "metrics": _metrics(scores),
        "per_class": _per_class(scores),
        "per_range": scores_per_range(matches),
        "errors_per_range": errors_per_range(matches),
        "confidence": _confidence(matches, resampled),
        **({} if trained == set(task.names) else {"trained": _trained(run, scores, resampled)}),
        "postprocessing_sha256": run.postprocessing_sha256,
        "parents": dict(run.parents),
        "coverage": {kind: list(counts) for kind, counts in run.coverage.items()},
        "profile": dict(run.profile),
        "config": dict(run.config),
        **({"engine": dict(run.engine)} if run.engine else {}),
    }


def _metrics(scores: Scores) -> Document:
    means = zip(TP_ERRORS, map(_known, scores.mean_errors.tolist()), strict=True)
    return {"mAP": scores.mean_ap, "NDS": scores.nds, **{f"m{error}": mean for error, mean in means}}


def _trained(run: RunInfo, scores: Scores, resampled: bootstrap.Resampled | None) -> Document:
    """MAP over the classes of a network made for some of them: official scores count the others as 0."""
    names = list(run.trained_classes or ())
    ap = None if resampled is None else resampled.class_ap[scores.task.ids(names)].mean(axis=0)
    interval = None if ap is None else list(bootstrap.interval(ap))
    return {"classes": names, "mAP": scores.mean_ap_of(names), "confidence": interval}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _per_class(scores: Scores) -> Document:
    return {
        name: {
            "AP": {
                **{str(key): float(ap) for key, ap in zip(THRESHOLDS_M, aps, strict=True)},
                "mean": float(aps.mean()),
            },
            **{key: _known(float(error)) for key, error in zip(TP_ERRORS, errors, strict=True)},
        }
        for name, aps, errors in zip(scores.task.names, scores.ap, scores.errors, strict=True)
    }


def _confidence(matches: Matches, resampled: bootstrap.Resampled | None) -> Document:
    method = bootstrap.method(len(matches.scene_name))
    if resampled is None:
        return {"mAP": None, "NDS": None, "method": method}
    nds = None if resampled.nds is None else list(bootstrap.interval(resampled.nds))
    return {"mAP": list(bootstrap.interval(resampled.mean_ap)), "NDS": nds, "method": method}


def _resample(matches: Matches) -> bootstrap.Resampled | None:
    num_scenes = len(matches.scene_name)
    if num_scenes < bootstrap.MIN_SCENES:
        return None
    return bootstrap.resample(matches, bootstrap.scene_weights(num_scenes))


def write_metrics(path: Path, document: Document) -> None:
    """Check and write `metrics.json`; the file appears only when it is whole.

    Raises:
        UserError: The document is not as the schema has it.
    """
    check_metrics(document, str(path))
    write_whole(path, json.dumps(sealed(document), indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path) -> Document:
    """Read and check `metrics.json`.

    Raises:
        UserError: The file is absent, damaged, no JSON, or not as the schema has it.
    """
    document = read_json(path, "metrics file")
    check_metrics(document, str(path))
    return unsealed(document, f"metrics file {str(path)!r}")


def _in_order(bounds: list[float]) -> list[float]:
    if bounds != sorted(bounds):
        raise ValueError(bounds)
    return bounds


_ROUNDING = 1e-6
"""So far a mean of numbers within their bounds may come out beyond them."""

_PAIR = Field(min_length=2, max_length=2)
_Score = Annotated[
    float,
    Field(strict=True, allow_inf_nan=False, ge=-_ROUNDING, le=1 + _ROUNDING),
    accepts("a finite number from 0 to 1"),
]
_MeanError = Annotated[
    float, Field(strict=True, allow_inf_nan=False, ge=-_ROUNDING), accepts("a finite number from 0 on")
]
_Error = Annotated[_MeanError | None, accepts("a finite number from 0 on, or null")]
_Bounds = Annotated[list[_Score], _PAIR, AfterValidator(_in_order)]
_Interval = Annotated[_Bounds | None, accepts("null or [lower, upper]")]
_ENGINE: Any = keys({**dict.fromkeys(("name", "version", "file", "sha256"), str), "target": NotRequired[str]})
_Coverage = dict[str, Annotated[list[Count], _PAIR]]

_BASE: dict[str, Any] = {
    "arm": Row,
    "checkpoint": keys({"path": str, "sha256": str}),
    "dataset": keys(
        {
            **dict.fromkeys(("root_name", "version", "split", "fingerprint"), str),
            "num_samples": CountAboveZero,
            "lidar_channel": NotRequired[str],
            "skipped_scenes": NotRequired[list[str]],
            "num_bad_sweeps": NotRequired[Count],
            "trained_on": NotRequired[str],
        }
    ),
    "confidence": keys({"mAP": _Interval, "NDS": _Interval, "method": str}),
    "postprocessing_sha256": str,
    **dict.fromkeys(("parents", "profile", "config"), dict[str, Any]),
    "engine": NotRequired[_ENGINE],
    "coverage": Annotated[_Coverage, accepts("a mapping of kind to [quantized, all]")],
}


def _some_of(names: Sequence[str]) -> Any:
    """The type of a list of classes, each once."""

    def check(found: list[str]) -> list[str]:
        if not found or len(set(found)) < len(found) or not set(found) <= set(names):
            raise ValueError(found)
        return found

    return Annotated[
        list[str], AfterValidator(check), accepts(f"one or more of {', '.join(names)}, each once")
    ]


@cache
def _kind(task: DetectionTask) -> TypeAdapter[Any]:
    """What `metrics.json` holds of a task's scores."""
    of_class = {"AP": keys(dict.fromkeys([*map(str, THRESHOLDS_M), "mean"], _Score))}
    has_errors = task.defined_errors.any(axis=0).tolist()
    known = dict(zip(TP_ERRORS, has_errors, strict=True))
    means = {f"m{error}": _MeanError if known[error] else _Error for error in TP_ERRORS}
    bins = {
        bin_name(lower, upper): keys(dict.fromkeys(["mAP", *classes_that_reach(task, upper)], _Score))
        for lower, upper in task.range_bins_m
    }
    nds = _Score if task.is_nuscenes else None
    trained = {"classes": _some_of(task.names), "mAP": _Score, "confidence": _Interval}
    return TypeAdapter(
        keys(
            {
                **_BASE,
                "trained": NotRequired[keys(trained)],
                "metrics": keys({"mAP": _Score, "NDS": nds, **means}),
                "per_class": keys(
                    dict.fromkeys(task.names, keys({**of_class, **dict.fromkeys(TP_ERRORS, _Error)}))
                ),
                "per_range": keys(bins),
            }
        )
    )


def task_of(document: Mapping[str, Any], where: str) -> DetectionTask:
    """Classes and rules of a run: nuScenes', unless `metrics.json` says others.

    Args:
        document: its contents.
        where: what to call it in the message.

    Raises:
        UserError: they are no classes.
    """
    if "classes" not in document:
        return NUSCENES
    return DetectionTask.from_dict(document["classes"], f"{where}: classes")


def check_metrics(document: Any, where: str) -> None:
    """Check the contents of `metrics.json`.

    Args:
        document: the contents.
        where: what to call it in the message.

    Raises:
        UserError: A key is missing or its value is not of the kind accepted; the message names both.
    """
    task = task_of(document, where) if isinstance(document, Mapping) else NUSCENES
    check_document(document, SCHEMA, _kind(task), where)
