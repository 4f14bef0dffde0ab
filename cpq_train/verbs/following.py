"""Settings that follow from others where nobody sets them."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from cpq_train.common.detection_task import NUSCENES, DetectionClass, DetectionTask
from cpq_train.verbs.given import Given

MONITOR_WITHOUT_NDS = "val/mAP"
FILENAME_WITHOUT_NDS = "epoch{epoch:02d}-mAP{val/mAP:.3f}"


def follow_classes(config: Namespace, given: Given) -> None:
    """Let the network have the data set's own classes, one head each, and the best checkpoint go by mAP.

    Args:
        config: of a verb.
        given: what a command line or a file sets.
    """
    if config.data.classes is None:
        return
    network, task = config.model.network, _task(config.data.classes)
    if tuple(network.class_names) == NUSCENES.names and "model.network.class_names" not in given:
        network.class_names = config.data.class_names = task.names
        if "model.network.class_groups" not in given:
            network.class_groups = tuple((name,) for name in task.names)
    if task.is_nuscenes or config.get("checkpoint") is None:
        return
    for name, value in (("monitor", MONITOR_WITHOUT_NDS), ("filename", FILENAME_WITHOUT_NDS)):
        if f"checkpoint.{name}" not in given:
            config.checkpoint[name] = value


def _task(classes: dict[str, Any]) -> DetectionTask:
    """The task of parsed settings.

    Raises:
        UserError: see `DetectionTask`.
    """
    return DetectionTask.of({name: DetectionClass(**vars(rules)) for name, rules in classes.items()})
