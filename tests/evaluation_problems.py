"""Random boxes as columns, and the same boxes as nuscenes-devkit's objects."""

import numpy as np
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import filter_eval_boxes
from nuscenes.eval.detection.data_classes import DetectionBox

from cpq_train.common.nuscenes import ATTRIBUTES, BIKE_RACK_CATEGORY, DETECTION_CLASSES
from cpq_train.evaluation.boxes import Boxes, GroundTruth, Ints, Predictions, Samples

Generator = np.random.Generator


def random_samples(num_samples: int, num_scenes: int, generator: Generator) -> Samples:
    return Samples(
        tokens=np.array([f"sample{i}" for i in range(num_samples)]),
        scene=np.arange(num_samples) * num_scenes // num_samples,
        scene_names=np.array([f"scene-{i:04d}" for i in range(num_scenes)]),
        ego_xy=generator.integers(-8, 8, (num_samples, 2)).astype(float),
    )


def random_boxes(num_boxes: int, samples: Samples, labels: Ints, generator: Generator) -> Boxes:
    """Boxes on a grid of 0.5 m around the vehicle, so that distances tie and fall on the limits exactly."""
    sample = generator.integers(0, len(samples), num_boxes)
    offset = generator.integers(-24, 24, (num_boxes, 2)) / 2
    far = generator.random(num_boxes) < 0.1  # exactly 30, 40 or 50 m away
    offset[far] = generator.choice([[18, 24], [-24, 32], [30, -40], [0, 40], [-40, -30]], far.sum())
    velocity = generator.normal(0, 2, (num_boxes, 2))
    velocity[generator.random(num_boxes) < 0.2] = np.nan
    return Boxes(
        sample=sample,
        label=generator.choice(labels, num_boxes),
        translation=np.column_stack([samples.ego_xy[sample] + offset, generator.normal(0, 1, num_boxes)]),
        size=generator.uniform(0.5, 3, (num_boxes, 3)),
        rotation=generator.normal(0, 1, (num_boxes, 4)),
        velocity=velocity,
        attribute=generator.integers(-1, len(ATTRIBUTES), num_boxes),
    )


def random_problem(
    seed: int, num_gt: int, num_pred: int, num_classes: int = 4, num_samples: int = 4, num_scenes: int = 2
) -> tuple[GroundTruth, Predictions]:
    """Some classes have annotations only, some detections only; scores are coarse and so tie."""
    generator = np.random.default_rng(seed)
    samples = random_samples(num_samples, num_scenes, generator)
    gt_labels = generator.choice(len(DETECTION_CLASSES), num_classes)
    pred_labels = np.append(gt_labels[1:], generator.integers(len(DETECTION_CLASSES)))
    boxes = random_boxes(num_gt, samples, gt_labels, generator)
    racks = random_boxes(2, samples, np.array([-1]), generator)
    racks.size[:] *= 4
    tokens = np.array([f"annotation{i}" for i in range(num_gt)], dtype=np.str_)
    annotations = GroundTruth(samples, boxes, generator.integers(0, 4, num_gt), tokens, racks)
    detections = random_boxes(num_pred, samples, pred_labels, generator)
    detections = detections[np.argsort(detections.sample, kind="stable")]
    return annotations, Predictions(detections, generator.integers(0, 8, num_pred) / 8)


def devkit_boxes(
    boxes: Boxes, samples: Samples, score: object = None, num_points: object = None
) -> EvalBoxes:
    """The boxes as the devkit holds them, with the distances that it keeps beside them."""
    result = EvalBoxes()
    for token in samples.tokens.tolist():
        result.add_boxes(token, [])
    for row, sample in enumerate(boxes.sample.tolist()):
        attribute = int(boxes.attribute[row])
        box = DetectionBox(
            sample_token=str(samples.tokens[sample]),
            translation=tuple(boxes.translation[row].tolist()),
            size=tuple(boxes.size[row].tolist()),
            rotation=tuple(boxes.rotation[row].tolist()),
            velocity=tuple(boxes.velocity[row].tolist()),
            ego_translation=(*(boxes.translation[row, :2] - samples.ego_xy[sample]).tolist(), 0.0),
            num_pts=-1 if num_points is None else int(num_points[row]),  # type: ignore[index]
            detection_name=DETECTION_CLASSES[boxes.label[row]],
            detection_score=-1.0 if score is None else float(score[row]),  # type: ignore[index]
            attribute_name="" if attribute < 0 else ATTRIBUTES[attribute],
        )
        result.add_boxes(box.sample_token, [box])
    return result


class RackTables:
    """As much of a devkit data set as its filter asks for."""

    def __init__(self, ground_truth: GroundTruth) -> None:
        self._racks, self._samples = ground_truth.racks, ground_truth.samples

    def get(self, table: str, token: object) -> dict[str, object]:
        if table == "sample":
            return {"anns": np.flatnonzero(self._samples.tokens[self._racks.sample] == token).tolist()}
        names = ("translation", "size", "rotation")
        columns = {name: getattr(self._racks, name)[token].tolist() for name in names}
        return {"category_name": BIKE_RACK_CATEGORY, **columns}


def devkit_filter(boxes: EvalBoxes, ground_truth: GroundTruth, class_range: dict[str, float]) -> EvalBoxes:
    return filter_eval_boxes(RackTables(ground_truth), boxes, class_range) if boxes.all else boxes
