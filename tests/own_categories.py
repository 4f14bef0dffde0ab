"""A simulated data set with the categories, scene names and splits of somebody else."""

import json
import shutil
from pathlib import Path
from typing import Any

VERSION = "v1.0-trainval"
OWN_NAMES = {
    "vehicle.car": "kfz.pkw",
    "vehicle.truck": "kfz.lkw",
    "vehicle.trailer": "kfz.anhaenger",
    "vehicle.bus.rigid": "kfz.bus",
    "human.pedestrian.adult": "mensch",
    "human.pedestrian.child": "mensch.kind",
    "movable_object.barrier": "ding.sperre",
    "movable_object.trafficcone": "ding.kegel",
}
CLASSES: dict[str, Any] = {
    "person": {"categories": ["mensch", "mensch.kind"], "range_m": 35.0},
    "fahrzeug": {
        "categories": ["kfz.pkw", "kfz.lkw", "kfz.anhaenger", "kfz.bus"],
        "range_m": 60.0,
        "attributes": ["vehicle.parked", "vehicle.moving", "vehicle.stopped"],
    },
    "hindernis": {
        "categories": ["ding.sperre", "ding.kegel"],
        "range_m": 25.0,
        "undefined_errors": ["AOE", "AVE", "AAE"],
        "is_symmetric": True,
    },
}
SPLITS = {"fahrten": ["drive-0", "drive-1", "drive-2"], "pruefung": ["drive-3", "drive-4"]}


def records(root: Path, table: str) -> Any:
    return json.loads((root / VERSION / f"{table}.json").read_text())


def write(root: Path, table: str, content: Any) -> None:
    (root / VERSION / f"{table}.json").write_text(json.dumps(content))


def own_categories(source: Path, root: Path) -> Path:
    """A copy of a simulated root in which nothing is called as nuScenes calls it."""
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".cpq_train"))
    categories = records(root, "category")
    for record in categories:
        record["name"] = OWN_NAMES.get(record["name"], f"sonst.{record['name']}")
    write(root, "category", categories)
    scenes = records(root, "scene")
    for number, record in enumerate(scenes):
        record["name"] = f"drive-{number}"
    write(root, "scene", scenes)
    write(root, "splits", SPLITS)
    return root
