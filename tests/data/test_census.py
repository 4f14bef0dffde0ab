"""Training data of which no annotation is a target, and timestamps in other units: told before any work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpq_train.common.errors import UserError
from cpq_train.data.census import check_targets
from cpq_train.data.index import NuScenesIndex, open_index

VERSION = "v1.0-mini"
WIDE = [-100.0, -100.0, -20.0, 100.0, 100.0, 20.0]
Change = Callable[[dict[str, Any]], object]


def changed(root: Path, table: str, change: Change) -> Path:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    for record in records:
        change(record)
    path.write_text(json.dumps(records))
    return root


def check(index: NuScenesIndex, names: list[str] | None = None, limits: list[float] = WIDE) -> None:
    check_targets(index, index.sample_rows("train"), names or list(index.task.names), limits, "train")


def test_data_with_targets_pass(index: NuScenesIndex) -> None:
    check(index)


def test_categories_of_no_class_are_named(root: Path) -> None:
    changed(root, "category", lambda record: record.update(name=f"x.{record['name']}"))
    with pytest.raises(UserError) as refused:
        check(open_index(root, VERSION))
    assert re.fullmatch(
        r"training split 'train': of (\d+) annotations in \d+ samples none counts: \1 are of other classes "
        r"\(categories of no class: 'x\..*data.classes can name them\); accepted: one or more that do",
        str(refused.value),
    )


def test_objects_without_points(root: Path) -> None:
    changed(root, "sample_annotation", lambda record: record.update(num_lidar_pts=0))
    with pytest.raises(UserError, match=r"none counts: .*\d+ have no LiDAR point; accepted: one or more"):
        check(open_index(root, VERSION))


def test_everything_out_of_range(index: NuScenesIndex) -> None:
    with pytest.raises(UserError, match=r"\d+ lie outside point_cloud_range \[900\.0"):
        check(index, limits=[900.0, 900.0, -5.0, 901.0, 901.0, 3.0])


def test_no_annotations(root: Path) -> None:
    (root / VERSION / "sample_annotation.json").write_text("[]")
    with pytest.raises(UserError, match=r"of 0 annotations in \d+ samples none counts; accepted"):
        check(open_index(root, VERSION))


def test_points_of_minus_one_are_refused_by_record(root: Path) -> None:
    changed(root, "sample_annotation", lambda record: record.update(num_lidar_pts=-1))
    with pytest.raises(
        UserError, match=r"sample_annotation, record .*: num_lidar_pts is -1; accepted: a count"
    ):
        open_index(root, VERSION)


@pytest.mark.parametrize(("factor", "unit"), [(1e-6, "s"), (1e-3, "ms"), (1e3, "ns")], ids=["s", "ms", "ns"])
def test_timestamps_in_other_units(root: Path, factor: float, unit: str) -> None:
    for table in ("sample", "sample_data"):
        changed(root, table, lambda record: record.update(timestamp=int(record["timestamp"] * factor)))
    with pytest.raises(
        UserError, match=r"table sample: timestamps of neighbouring samples are .* apart"
    ) as refused:
        open_index(root, VERSION)
    said = rf"in {unit} they would be 0\.(5|499991) s apart"
    assert unit == "s" or re.search(said, str(refused.value))


def test_samples_and_key_frames_in_different_units(root: Path) -> None:
    changed(root, "sample_data", lambda record: record.update(timestamp=record["timestamp"] * 1000))
    with pytest.raises(
        UserError, match=r"LiDAR key frames are .* s and more from the times of their samples"
    ):
        open_index(root, VERSION)


FIELDS = [
    "sample_annotation.num_lidar_pts",
    "sample_annotation.num_radar_pts",
    "sample_annotation.attribute_tokens",
    "sample_annotation.instance_token",
    "sample_annotation.prev",
    "sample_data.is_key_frame",
    "sample_data.timestamp",
    "sample_data.calibrated_sensor_token",
    "sample_data.prev",
    "ego_pose.rotation",
    "calibrated_sensor.translation",
    "calibrated_sensor.sensor_token",
    "sensor.channel",
    "sample.scene_token",
    "scene.name",
    "category.name",
    "attribute.name",
    "instance.category_token",
]


@pytest.mark.parametrize("table_and_field", FIELDS)
def test_a_record_without_a_field_names_table_token_and_field(root: Path, table_and_field: str) -> None:
    table, field = table_and_field.split(".")
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    frames = json.loads((root / VERSION / "sample_data.json").read_text())
    lidar = next(frame for frame in frames if "LIDAR_TOP" in frame["filename"])
    wanted = {"sample_data": lidar["token"], "ego_pose": lidar["ego_pose_token"]}.get(table)
    record = next((r for r in records if r["token"] == wanted), records[-1])
    del record[field]
    path.write_text(json.dumps(records))
    with pytest.raises(UserError, match=f"table {table}, record '{record['token']}' has no '{field}'; acc"):
        open_index(root, VERSION)


def test_another_lidar(root: Path) -> None:
    def rename(record: dict[str, Any]) -> None:
        record["channel"] = record["channel"].replace("LIDAR_TOP", "LIDAR_FRONT")

    changed(root, "sensor", rename)
    with pytest.raises(UserError, match=r"data.lidar_channel is 'LIDAR_TOP'; accepted: .*'LIDAR_FRONT'"):
        open_index(root, VERSION)
    index = open_index(root, VERSION, lidar_channel="LIDAR_FRONT")
    assert len(index) == 8
    assert index.dataset_info()["lidar_channel"] == "LIDAR_FRONT"
