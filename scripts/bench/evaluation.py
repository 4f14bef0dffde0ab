"""The nuScenes metric on as many boxes as the validation split has: this package against nuscenes-devkit.

    python scripts/bench/evaluation.py                     # 6019 samples, 1.2 million detections
    python scripts/bench/evaluation.py --num_samples 602   # a tenth of it

Both score the same boxes, drawn to be like a detector's: ours from arrays to AP, errors and NDS, filters
included; the devkit with its `accumulate`, `calc_ap` and `calc_tp`, from its own box objects, whose making is
not counted. The clock is the process's CPU time: both run on one thread, and other work on the machine does
not count. Ends with an error where a score differs by more than 1e-9 or the ratio is below `min_ratio`. The
devkit takes minutes at full size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jsonargparse import auto_cli
from machine import settle
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionBox, DetectionMetrics
from results import write_rows

from cpq_train.common.nuscenes import ATTRIBUTES, DETECTION_CLASSES
from cpq_train.common.progress import track
from cpq_train.data.boxes import yaw_quaternions
from cpq_train.evaluation.boxes import Boxes, Floats, GroundTruth, Ints, Predictions, Samples
from cpq_train.evaluation.filtering import counts_as_detection, counts_as_ground_truth
from cpq_train.evaluation.metric import evaluate

NUM_VAL_SAMPLES, NUM_VAL_SCENES = 6019, 150
SHARES = np.array([0.42, 0.075, 0.012, 0.014, 0.021, 0.13, 0.011, 0.01, 0.21, 0.097])
"""About how often the ten classes are annotated in nuScenes."""
TOLERANCE = 1e-9

Result = TypeVar("Result")


def main(
    num_samples: int = NUM_VAL_SAMPLES,
    objects_per_sample: int = 40,
    detections_per_sample: int = 240,
    min_ratio: float = 25.0,
    seed: int = 0,
) -> None:
    """Time both and compare their scores.

    Args:
        num_samples: Samples; the validation split has 6019.
        objects_per_sample: Annotations drawn for each, before filters.
        detections_per_sample: Detections drawn for each, before filters (200 are left).
        min_ratio: How many times faster ours has to be.
        seed: Of the draws.
    """
    settle()
    annotations, predictions = _draw(num_samples, objects_per_sample, detections_per_sample, seed)
    num_boxes = f"{len(annotations.boxes):,} annotations, {len(predictions.score):,} detections"
    print(f"{num_samples:,} samples, {num_boxes}")
    passes = [_timed(lambda: evaluate(annotations, predictions).scores) for _ in range(3)]
    ours, our_s = min(passes, key=_seconds)
    print(f"ours:   {our_s:8.2f} s   mAP {ours.mean_ap:.9f}   NDS {ours.nds:.9f}")
    gt_boxes = _devkit_boxes(annotations.boxes, annotations.samples, None)
    pred_boxes = _devkit_boxes(predictions.boxes, annotations.samples, predictions.score)
    theirs, their_s = _timed(lambda: _devkit_scores(gt_boxes, pred_boxes))
    print(f"devkit: {their_s:8.2f} s   mAP {theirs.mean_ap:.9f}   NDS {theirs.nd_score:.9f}")
    difference = _largest_difference(ours.ap, ours.errors, theirs)
    print(f"ratio {their_s / our_s:.1f}, largest difference of any AP or error {difference:.1e}")
    row = {"samples": num_samples, "this package, s": our_s, "devkit, s": their_s, "ratio": their_s / our_s}
    write_rows("evaluation", [row], clock="CPU time")
    if difference > TOLERANCE or their_s / our_s < min_ratio:
        sys.exit(f"expected at most {TOLERANCE:g} and at least {min_ratio:g} times")


def _timed(run: Callable[[], Result]) -> tuple[Result, float]:
    start = time.process_time()
    return run(), time.process_time() - start


def _seconds(timed: tuple[Result, float]) -> float:
    return timed[1]


def _draw(
    num_samples: int, num_objects: int, num_detections: int, seed: int
) -> tuple[GroundTruth, Predictions]:
    """Objects around vehicles; most are found, displaced and with the higher scores, the rest is noise."""
    generator = np.random.default_rng(seed)
    samples = Samples(
        tokens=np.array([f"sample{number}" for number in range(num_samples)]),
        scene=np.arange(num_samples) * NUM_VAL_SCENES // num_samples,
        scene_names=np.array([f"scene-{number:04d}" for number in range(NUM_VAL_SCENES)]),
        ego_xy=generator.uniform(0, 2000, (num_samples, 2)),
    )
    boxes = _boxes(samples, np.repeat(np.arange(num_samples), num_objects), generator)
    found = boxes[generator.random(len(boxes)) < 0.9]
    found.translation[:, :2] += generator.normal(0, 0.5, (len(found), 2))
    found.size[:] *= generator.uniform(0.8, 1.2, found.size.shape)
    found.velocity[:] += generator.normal(0, 0.5, found.velocity.shape)
    noise = _boxes(
        samples, generator.integers(0, num_samples, num_samples * num_detections - len(found)), generator
    )
    score = np.concatenate([generator.beta(3, 2, len(found)), generator.beta(1, 6, len(noise))])
    names = Boxes.__dataclass_fields__
    both = Boxes(*(np.concatenate([getattr(part, name) for part in (found, noise)]) for name in names))
    order = np.argsort(both.sample, kind="stable")
    return _that_count(samples, boxes, Predictions(both, score)[order])


def _that_count(samples: Samples, boxes: Boxes, predictions: Predictions) -> tuple[GroundTruth, Predictions]:
    """Without what the filters take away: the devkit's scores are asked without its filters."""
    tokens = np.array([f"annotation{number}" for number in range(len(boxes))])
    racks = boxes[np.zeros(0, np.int64)]
    annotations = GroundTruth(samples, boxes, np.ones(len(boxes), np.int64), tokens, racks)
    kept = annotations[counts_as_ground_truth(annotations)]
    return kept, predictions[counts_as_detection(predictions, annotations)]


def _boxes(samples: Samples, sample: Ints, generator: np.random.Generator) -> Boxes:
    angle, radius = generator.uniform(-np.pi, np.pi, len(sample)), generator.gamma(3, 9, len(sample))
    offset = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    label = generator.choice(len(DETECTION_CLASSES), len(sample), p=SHARES / SHARES.sum())
    return Boxes(
        sample=sample,
        label=label,
        translation=np.column_stack([samples.ego_xy[sample] + offset, generator.normal(0, 1, len(sample))]),
        size=np.array([1.9, 4.6, 1.7]) * generator.uniform(0.7, 1.3, (len(sample), 3)),
        rotation=yaw_quaternions(generator.uniform(-np.pi, np.pi, len(sample))),
        velocity=generator.normal(0, 3, (len(sample), 2)),
        attribute=np.where(label == DETECTION_CLASSES.index("traffic_cone"), -1, label % len(ATTRIBUTES)),
    )


def _devkit_boxes(boxes: Boxes, samples: Samples, score: Floats | None) -> EvalBoxes:
    found = EvalBoxes()
    columns = (boxes.translation, boxes.size, boxes.rotation, boxes.velocity, boxes.label, boxes.attribute)
    scores = np.full(len(boxes), -1.0) if score is None else score
    per_sample: dict[str, list[DetectionBox]] = {token: [] for token in samples.tokens.tolist()}
    listed = zip(
        samples.tokens[boxes.sample].tolist(), *(c.tolist() for c in (*columns, scores)), strict=True
    )
    for token, translation, size, rotation, velocity, label, attribute, confidence in listed:
        box = DetectionBox(
            sample_token=token,
            translation=tuple(translation),
            size=tuple(size),
            rotation=tuple(rotation),
            velocity=tuple(velocity),
            detection_name=DETECTION_CLASSES[label],
            detection_score=confidence,
            attribute_name="" if attribute < 0 else ATTRIBUTES[attribute],
        )
        per_sample[token].append(box)
    for token, of_sample in per_sample.items():
        found.add_boxes(token, of_sample)
    return found


def _devkit_scores(gt_boxes: EvalBoxes, pred_boxes: EvalBoxes) -> DetectionMetrics:
    """As `DetectionEval.evaluate` has it."""
    config = config_factory("detection_cvpr_2019")
    metrics = DetectionMetrics(config)
    for name in track(DETECTION_CLASSES, "devkit"):
        of_class = {
            threshold: accumulate(gt_boxes, pred_boxes, name, config.dist_fcn_callable, threshold)
            for threshold in config.dist_ths
        }
        for threshold, data in of_class.items():
            metrics.add_label_ap(name, threshold, calc_ap(data, config.min_recall, config.min_precision))
        for metric in TP_METRICS:
            undefined = (name == "traffic_cone" and metric in ("attr_err", "vel_err", "orient_err")) or (
                name == "barrier" and metric in ("attr_err", "vel_err")
            )
            error = np.nan if undefined else calc_tp(of_class[config.dist_th_tp], config.min_recall, metric)
            metrics.add_label_tp(name, metric, error)
    return metrics


def _largest_difference(ap: Floats, errors: Floats, theirs: DetectionMetrics) -> float:
    thresholds = theirs.cfg.dist_ths
    their_ap = [
        [theirs.get_label_ap(name, threshold) for threshold in thresholds] for name in DETECTION_CLASSES
    ]
    their_errors = [
        [theirs.get_label_tp(name, metric) for metric in TP_METRICS] for name in DETECTION_CLASSES
    ]
    assert np.array_equal(np.isnan(errors), np.isnan(their_errors))
    differences = np.abs(ap - np.array(their_ap)).max(), np.nanmax(np.abs(errors - np.array(their_errors)))
    return float(max(differences))


if __name__ == "__main__":
    auto_cli(main)
