"""Settings that follow from others where nobody sets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jsonargparse import Namespace

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.detection_task import NUSCENES, DetectionClass, DetectionTask
from cpq_train.common.nuscenes import CLASS_GROUPS
from cpq_train.data.settings import CLASSES_KEY, DATA_KEY
from cpq_train.export.names import ENGINE_SUFFIX
from cpq_train.export.sidecar import read_sidecar
from cpq_train.models.config import as_tuples
from cpq_train.training.settings import hyper_parameters
from cpq_train.verbs.checkpoint_settings import files_of
from cpq_train.verbs.given import Given

MONITOR_WITHOUT_NDS = "val/mAP"
FILENAME_WITHOUT_NDS = "epoch{epoch:02d}-mAP{val/mAP:.3f}"


def follow_classes(config: Namespace, given: Given) -> list[str]:
    """Let classes be those of the checkpoint, or of the data set, and the best one go by what there is.

    Args:
        config: of a verb.
        given: what a command line or a file sets.

    Returns:
        A sentence where the data set's classes are others than the checkpoint's.
    """
    network, said = config.model.network, _said_by_checkpoint(config)
    differences = _take_classes(config, said)
    for name in ("class_names", "class_groups"):
        if name in said.network and f"model.network.{name}" not in given:
            network[name] = as_tuples(said.network[name])
    task = _task(config.data.classes)
    is_usual = as_tuples(network.class_names) == NUSCENES.names
    if task is not NUSCENES and is_usual and "model.network.class_names" not in given:
        network.class_names = task.names
    config.data.class_names = network.class_names
    if as_tuples(network.class_groups) == CLASS_GROUPS and "model.network.class_groups" not in given:
        network.class_groups = groups_of(network.class_names)
    if not task.is_nuscenes and config.get("checkpoint") is not None:
        for name, value in (("monitor", MONITOR_WITHOUT_NDS), ("filename", FILENAME_WITHOUT_NDS)):
            if f"checkpoint.{name}" not in given:
                config.checkpoint[name] = value
    return differences


class _Said(NamedTuple):
    """What a checkpoint, or the sidecar of a deployment file, says of classes; nothing without one."""

    name: str = ""
    network: Mapping[str, Any] = MappingProxyType({})
    classes: Mapping[str, Any] | None = None


def _said_by_checkpoint(config: Namespace) -> _Said:
    path = next(iter(files_of(config)), None)
    parts_only = config.model.weights_parts is not None and str(path) == config.model.weights
    if path is None or config.get("checkpoints") or parts_only:  # of parts the classes may be others
        return _Said()
    if path.suffix == ENGINE_SUFFIX:
        sidecar = read_sidecar(path)
        return _Said(str(path), sidecar.network, sidecar.data.get(CLASSES_KEY))
    content = read_checkpoint(path, mmap=True)
    data, network = content.get(DATA_KEY) or {}, hyper_parameters(content, path).get("network") or {}
    return _Said(str(path), network, data.get(CLASSES_KEY))


def _take_classes(config: Namespace, said: _Said) -> list[str]:
    """Let the data set's classes be those that a checkpoint was made with, where no other are given."""
    if said.classes is None:
        return []
    made_with = DetectionTask.from_dict(said.classes, f"checkpoint {said.name!r}, {DATA_KEY}.{CLASSES_KEY}")
    if config.data.classes is None:
        config.data.classes = {name: Namespace(**rules) for name, rules in made_with.to_dict().items()}
    elif _task(config.data.classes) != made_with:
        return [f"data.classes are others than those that checkpoint {said.name!r} was made with"]
    return []


def groups_of(class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Class names by head: nuScenes' classes as its groups have them, each other one in a head of its own."""
    usual = [tuple(name for name in group if name in class_names) for group in CLASS_GROUPS]
    return (*filter(None, usual), *((name,) for name in class_names if name not in NUSCENES.names))


def _task(classes: dict[str, Any] | None) -> DetectionTask:
    """The task of parsed settings; nuScenes' where there are none.

    Raises:
        UserError: see `DetectionTask`.
    """
    if classes is None:
        return NUSCENES
    return DetectionTask.of({name: DetectionClass(**vars(rules)) for name, rules in classes.items()})
