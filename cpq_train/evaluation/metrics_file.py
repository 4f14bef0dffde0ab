"""`metrics.json`: what a run scored, on what, and how; the file that `compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import NotRequired

from cpq_train.common.arm_names import Row
from cpq_train.common.documents import read_json, sealed, unsealed
from cpq_train.common.files import write_whole
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.common.schema import Count, CountAboveZero, accepts, check_document, keys
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Scores
from cpq_train.evaluation.protocol import CLASS_RANGE_M, RANGE_BINS_M, THRESHOLDS_M, TP_ERRORS
from cpq_train.evaluation.ranges import errors_per_range, scores_per_range

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
        dataset: "root_name", "version" and "fingerprint", as the index gives them.
        split: name of the split scored.
        postprocessing_sha256: hash of the post-processing settings; runs that differ in it are not compared.
            `UNKNOWN` for a submission, which is compared with any.
        parents: arm to sha256 of the checkpoints this one came from.
        coverage: kind of layer to [quantized, all].
        profile: measurements of size, latency and memory.
        config: the settings of the run.
        engine: "name" and "version" of the engine, "file", "sha256" and "target" of what it ran; empty where
            PyTorch ran a network.
    """

    arm: str
    checkpoint_path: str
    checkpoint_sha256: str
    dataset: Mapping[str, str]
    split: str
    postprocessing_sha256: str
    parents: Mapping[str, str] = field(default_factory=dict)
    coverage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, str] = field(default_factory=dict)


def build_metrics(run: RunInfo, scores: Scores, matches: Matches) -> Document:
    """The contents of `metrics.json`, with bootstrap intervals and AP per range."""
    return {
        "schema": SCHEMA,
        "arm": run.arm,
        "checkpoint": {"path": run.checkpoint_path, "sha256": run.checkpoint_sha256},
        "dataset": {**run.dataset, "split": run.split, "num_samples": len(matches.sample_token)},
        "metrics": _metrics(scores),
        "per_class": _per_class(scores),
        "per_range": scores_per_range(matches),
        "errors_per_range": errors_per_range(matches),
        "confidence": _confidence(matches),
        "postprocessing_sha256": run.postprocessing_sha256,
        "parents": dict(run.parents),
        "coverage": {kind: list(counts) for kind, counts in run.coverage.items()},
        "profile": dict(run.profile),
        "config": dict(run.config),
        **({"engine": dict(run.engine)} if run.engine else {}),
    }


def _metrics(scores: Scores) -> Document:
    means = {f"m{error}": float(value) for error, value in zip(TP_ERRORS, scores.mean_errors, strict=True)}
    return {"mAP": scores.mean_ap, "NDS": scores.nds, **means}


def _per_class(scores: Scores) -> Document:
    return {
        name: {
            "AP": {
                **{str(key): float(ap) for key, ap in zip(THRESHOLDS_M, aps, strict=True)},
                "mean": float(aps.mean()),
            },
            **{
                key: None if np.isnan(error) else float(error)
                for key, error in zip(TP_ERRORS, errors, strict=True)
            },
        }
        for name, aps, errors in zip(DETECTION_CLASSES, scores.ap, scores.errors, strict=True)
    }


def _confidence(matches: Matches) -> Document:
    num_scenes = len(matches.scene_name)
    if num_scenes < bootstrap.MIN_SCENES:
        return {"mAP": None, "NDS": None, "method": bootstrap.method(num_scenes)}
    resampled = bootstrap.resample(matches, bootstrap.scene_weights(num_scenes))
    return {
        "mAP": list(bootstrap.interval(resampled.mean_ap)),
        "NDS": list(bootstrap.interval(resampled.nds)),
        "method": bootstrap.method(num_scenes),
    }


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

_KIND = TypeAdapter(
    keys(
        {
            "arm": Row,
            "checkpoint": keys({"path": str, "sha256": str}),
            "dataset": keys(
                {
                    **dict.fromkeys(("root_name", "version", "split", "fingerprint"), str),
                    "num_samples": CountAboveZero,
                }
            ),
            "metrics": keys({**dict.fromkeys(METRICS, _MeanError), "mAP": _Score, "NDS": _Score}),
            "per_class": keys(
                {
                    name: keys(
                        {
                            "AP": keys(dict.fromkeys([*map(str, THRESHOLDS_M), "mean"], _Score)),
                            **dict.fromkeys(TP_ERRORS, _Error),
                        }
                    )
                    for name in DETECTION_CLASSES
                }
            ),
            "per_range": keys(
                {
                    f"{lower:g}-{upper:g}": keys(
                        dict.fromkeys(
                            ["mAP", *(name for name in DETECTION_CLASSES if CLASS_RANGE_M[name] >= upper)],
                            _Score,
                        )
                    )
                    for lower, upper in RANGE_BINS_M
                }
            ),
            "confidence": keys({"mAP": _Interval, "NDS": _Interval, "method": str}),
            "postprocessing_sha256": str,
            **dict.fromkeys(("parents", "profile", "config"), dict[str, Any]),
            "engine": NotRequired[_ENGINE],
            "coverage": Annotated[_Coverage, accepts("a mapping of kind to [quantized, all]")],
        }
    )
)


def check_metrics(document: Any, where: str) -> None:
    """Check the contents of `metrics.json`.

    Args:
        document: the contents.
        where: what to call it in the message.

    Raises:
        UserError: A key is missing or its value is not of the kind accepted; the message names both.
    """
    check_document(document, SCHEMA, _KIND, where)
