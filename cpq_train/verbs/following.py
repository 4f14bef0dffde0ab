"""Settings that follow from others where nobody sets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from cpq_train.common.detection_task import NUSCENES, DetectionClass, DetectionTask
from cpq_train.common.nuscenes import CLASS_GROUPS
from cpq_train.verbs.given import Given

MONITOR_WITHOUT_NDS = "val/mAP"
FILENAME_WITHOUT_NDS = "epoch{epoch:02d}-mAP{val/mAP:.3f}"


def follow_classes(config: Namespace, given: Given) -> None:
    """Let the network have the data set's own classes, heads be of its classes, and the best go by mAP.

    Args:
        config: of a verb.
        given: what a command line or a file sets.
    """
    network, task = config.model.network, _task(config.data.classes)
    has_usual_names = tuple(network.class_names) == NUSCENES.names
    if task is not NUSCENES and has_usual_names and "model.network.class_names" not in given:
        network.class_names = config.data.class_names = task.names
    if _tuples(network.class_groups) == CLASS_GROUPS and "model.network.class_groups" not in given:
        network.class_groups = groups_of(network.class_names)
    if task.is_nuscenes or config.get("checkpoint") is None:
        return
    for name, value in (("monitor", MONITOR_WITHOUT_NDS), ("filename", FILENAME_WITHOUT_NDS)):
        if f"checkpoint.{name}" not in given:
            config.checkpoint[name] = value


def groups_of(class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Class names by head: nuScenes' classes as its groups have them, each other one in a head of its own."""
    usual = [tuple(name for name in group if name in class_names) for group in CLASS_GROUPS]
    return (*filter(None, usual), *((name,) for name in class_names if name not in NUSCENES.names))


def _tuples(groups: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, groups))


def _task(classes: dict[str, Any] | None) -> DetectionTask:
    """The task of parsed settings; nuScenes' where there are none.

    Raises:
        UserError: see `DetectionTask`.
    """
    if classes is None:
        return NUSCENES
    return DetectionTask.of({name: DetectionClass(**vars(rules)) for name, rules in classes.items()})
