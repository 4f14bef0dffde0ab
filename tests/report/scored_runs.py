"""Run folders of made-up scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from evaluation_problems import random_problem

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.evaluation.boxes import GroundTruth, Predictions
from cpq_train.evaluation.matches import write_matches
from cpq_train.evaluation.metric import Evaluation, evaluate
from cpq_train.evaluation.metrics_file import RunInfo, build_metrics, write_metrics

DATASET = {"root_name": "data", "version": "v1.0-trainval", "fingerprint": "f" * 64}


def noisy(annotations: GroundTruth, noise_m: float) -> Predictions:
    """All annotations as detections, displaced; the better the arm, the less."""
    generator = np.random.default_rng(0)
    boxes = annotations.boxes[np.arange(len(annotations.boxes))]
    boxes.translation[:, :2] += generator.normal(0, noise_m, (len(boxes), 2))
    return Predictions(boxes, generator.random(len(boxes)))


def write_arm(folder: Path, arm: str, noise_m: float, parents: dict[str, str] | None = None) -> Evaluation:
    annotations = random_problem(4, 1200, 0, num_classes=10, num_samples=40, num_scenes=10)[0]
    found = evaluate(annotations, noisy(annotations, noise_m))
    coverage = {"sparse": (20, 21), "conv2d": (85, 85)} if arm in ("ptq", "qat") else {}
    run = RunInfo(arm, f"{arm}.ckpt", folder.name, DATASET, "val", "nms", parents or {}, coverage)
    _write(folder, run, found)
    return found


def write_own_arm(folder: Path, arm: str, range_m: float) -> None:
    """The classes of nuScenes, all with one range."""
    classes = zip(NUSCENES.names, NUSCENES.rules, strict=True)
    task = DetectionTask.of({name: replace(rules, range_m=range_m) for name, rules in classes})
    annotations = random_problem(4, 1200, 0, num_classes=10, num_samples=40, num_scenes=10)[0]
    predictions = noisy(annotations, 0.2)
    found = evaluate(replace(annotations, task=task), replace(predictions, task=task))
    _write(folder, RunInfo(arm, f"{arm}.ckpt", folder.name, DATASET, "val", "nms"), found)


def _write(folder: Path, run: RunInfo, found: Evaluation) -> None:
    folder.mkdir(parents=True)
    write_metrics(folder / "metrics.json", build_metrics(run, found.scores, found.matches))
    write_matches(folder / "matches.npz", found.matches)
