"""`metrics.json`: what a run scored, on what, and how; the file that `compare` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpq_train.common.arm_names import ROWS
from cpq_train.common.errors import UserError
from cpq_train.common.files import write_whole
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.common.schema import MAPPING, NUMBER, TEXT, Check, check_document, is_number
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.matches import Matches
from cpq_train.evaluation.metric import Scores
from cpq_train.evaluation.protocol import CLASS_RANGE_M, RANGE_BINS_M, THRESHOLDS_M, TP_ERRORS
from cpq_train.evaluation.ranges import errors_per_range, scores_per_range

SCHEMA = 1
METRICS = ("mAP", "NDS", *(f"m{error}" for error in TP_ERRORS))

Document = dict[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """What `metrics.json` says beside the scores.

    Attributes:
        arm: "float", "float_tuned", "ptq", "qat", or "deployed" for an exported file that an engine runs.
        checkpoint_path: the checkpoint scored, or the one that the file was made of.
        checkpoint_sha256: its hash.
        dataset: "root_name", "version" and "fingerprint", as the index gives them.
        split: name of the split scored.
        postprocessing_sha256: hash of the post-processing settings; runs that differ in it are not compared.
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
    write_whole(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_metrics(path: Path) -> Document:
    """Read and check `metrics.json`.

    Raises:
        UserError: The file is absent, no JSON, or not as the schema has it.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable metrics.json ({error})") from error
    check_metrics(document, str(path))
    return dict(document)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]


def _is_coverage(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(count, int) for count in value)


_ERROR: Check = (lambda value: value is None or is_number(value), "a finite number or null")
_INTERVAL: Check = (lambda value: value is None or _is_interval(value), "null or [lower, upper]")

_KEYS: dict[str, Any] = {
    "arm": (lambda value: value in ROWS, ", ".join(ROWS)),
    "checkpoint": {"path": TEXT, "sha256": TEXT},
    "dataset": {
        "root_name": TEXT,
        "version": TEXT,
        "split": TEXT,
        "num_samples": (lambda value: isinstance(value, int) and value > 0, "a count above 0"),
        "fingerprint": TEXT,
    },
    "metrics": dict.fromkeys(METRICS, NUMBER),
    "per_class": {
        name: {
            "AP": dict.fromkeys([*map(str, THRESHOLDS_M), "mean"], NUMBER),
            **dict.fromkeys(TP_ERRORS, _ERROR),
        }
        for name in DETECTION_CLASSES
    },
    "per_range": {
        f"{lower:g}-{upper:g}": dict.fromkeys(
            ["mAP", *(name for name in DETECTION_CLASSES if CLASS_RANGE_M[name] >= upper)], NUMBER
        )
        for lower, upper in RANGE_BINS_M
    },
    "confidence": {"mAP": _INTERVAL, "NDS": _INTERVAL, "method": TEXT},
    "postprocessing_sha256": TEXT,
    "parents": MAPPING,
    "coverage": (
        lambda value: isinstance(value, dict) and all(map(_is_coverage, value.values())),
        "a mapping of kind to [quantized, all]",
    ),
    "profile": MAPPING,
    "config": MAPPING,
}


def check_metrics(document: Any, where: str) -> None:
    """Check the contents of `metrics.json`.

    Args:
        document: the contents.
        where: what to call it in the message.

    Raises:
        UserError: A key is missing or its value is not of the kind accepted; the message names both.
    """
    check_document(document, SCHEMA, _KEYS, where)
