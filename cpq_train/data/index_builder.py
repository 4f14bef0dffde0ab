"""Turns nuScenes' tables into columns: one array per property, rows addressed by number instead of token.

Row numbers: a sample is a row of table `sample`, a frame is a row of `sample_data` of the LiDAR (key
frames and sweeps), a scene is a row of `scene`. Annotations are sorted by sample, in table order within it.
Shape letters: S samples, F frames, A annotations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError, shown
from cpq_train.common.nuscenes import BIKE_RACK_CATEGORY
from cpq_train.data.annotation_columns import AnnotationColumns, Columns
from cpq_train.data.boxes import Float64, pose_matrices
from cpq_train.data.records import (
    Record,
    byte_strings,
    is_in_circle,
    record_check,
    referred,
    refuse_first,
    twice,
)
from cpq_train.data.tables import TableReader
from cpq_train.data.times import check_times

_FRAME_KEYS = (
    "token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "is_key_frame",
    "filename", "prev",
)  # fmt: skip


def read_columns(reader: TableReader, task: DetectionTask, lidar_channel: str) -> Columns:
    """Reads all tables and returns the columns that `NuScenesIndex` documents.

    Args:
        reader: the tables.
        task: gives categories and attributes their ids.
        lidar_channel: name of the LiDAR in table `sensor`.

    Raises:
        UserError: a table is damaged, holds a value that is not accepted, or refers to a record that does
            not exist; or there is no such LiDAR.
    """
    category_names = {token: r["name"] for token, r in _by_token(reader, "category").items()}
    attribute_names = {token: r["name"] for token, r in _by_token(reader, "attribute").items()}
    _check_task(task, category_names.values(), attribute_names.values())
    attributes = {name: number for number, name in enumerate(task.attributes)}
    attribute_ids = {token: attributes.get(name, -1) for token, name in attribute_names.items()}
    channels = {token: r["channel"] for token, r in _by_token(reader, "sensor").items()}
    if lidar_channel not in channels.values():
        have = ", ".join(map(shown, sorted(set(channels.values())))) or "none"
        raise UserError(f"data.lidar_channel is {shown(lidar_channel)}; accepted: {have} of table sensor")
    calibrations = {
        token: r
        if referred(channels, "sensor", "calibrated_sensor", r, "sensor_token") == lidar_channel
        else None
        for token, r in _by_token(reader, "calibrated_sensor").items()
    }
    scenes = _scene_names(reader)
    samples = list(_by_token(reader, "sample").values())
    if not samples:
        raise UserError("table sample holds no record; accepted: one or more")
    frames = _lidar_frames(reader, calibrations)

    columns = _sample_columns(samples, scenes)
    sample_rows = {record["token"]: row for row, record in enumerate(samples)}
    columns |= _frame_columns(frames, calibrations, _ego_poses(reader, frames))
    columns |= _key_frame_columns(columns, frames, samples, sample_rows, lidar_channel)
    check_times(columns)
    del frames, samples  # half a gigabyte for the whole of nuScenes
    annotations = AnnotationColumns(sample_rows, attribute_ids, _instances(reader, category_names, task))
    check = record_check("sample_annotation")
    for row, record in enumerate(reader.records("sample_annotation")):
        check(record, row)
        annotations.add(record)
    return columns | annotations.columns(columns)


def _check_task(task: DetectionTask, categories: Collection[str], attributes: Collection[str]) -> None:
    """See that own classes are of this data set; nuScenes' own versions need not have all of its categories.

    Raises:
        UserError: one names a category or an attribute that the tables do not have.
    """
    if task == NUSCENES:
        return
    for name, rules in zip(task.names, task.rules, strict=True):
        for table, named, has in (
            ("category", rules.categories, categories),
            ("attribute", rules.attributes, attributes),
        ):
            if unknown := [one for one in named if one not in has]:
                raise UserError(
                    f"data.classes {shown(name)} names {shown(unknown[0])}, which table {table} has not; "
                    f"accepted: {', '.join(map(shown, sorted(has)))}"
                )


def _by_token(reader: TableReader, table: str) -> dict[str, Record]:
    """The records of a table.

    Raises:
        UserError: two have one token.
    """
    check, records = record_check(table), dict[str, Record]()
    for row, record in enumerate(reader.records(table)):
        check(record, row)
        if record["token"] in records:
            twice(table, record["token"])
        records[record["token"]] = record
    return records


def _scene_names(reader: TableReader) -> dict[str, str]:
    """Scene names by token; splits go by the names.

    Raises:
        UserError: two scenes have one name.
    """
    names = {token: record["name"] for token, record in _by_token(reader, "scene").items()}
    for name, number in Counter(names.values()).items():
        if number > 1:
            twice("scene", name, "name")
    return names


def _lidar_frames(reader: TableReader, calibrations: Mapping[str, Record | None]) -> list[Record]:
    """What is used of the records of the LiDAR; those of cameras and radars are looked at no further."""
    check = record_check("sample_data")
    frames: dict[str, Record] = {}
    for row, record in enumerate(reader.records("sample_data")):
        reference: Any = record.get("calibrated_sensor_token")
        if type(reference) is not str:
            check(record, row)
        if reference not in calibrations:
            referred(calibrations, "calibrated_sensor", "sample_data", record, "calibrated_sensor_token")
        if calibrations[reference] is None:
            continue
        check(record, row)
        if record["token"] in frames:
            twice("sample_data", record["token"])
        frames[record["token"]] = {key: record[key] for key in _FRAME_KEYS}
    return list(frames.values())


def _sample_columns(samples: list[Record], scenes: Mapping[str, str]) -> Columns:
    rows = {token: row for row, token in enumerate(scenes)}
    scene_rows = [referred(rows, "scene", "sample", r, "scene_token") for r in samples]
    return {
        "scene_names": byte_strings(list(scenes.values()), "scene", "name"),
        "sample_tokens": byte_strings([r["token"] for r in samples], "sample", "token"),
        "sample_times_us": np.array([r["timestamp"] for r in samples], dtype=np.int64),
        "sample_scenes": np.array(scene_rows, dtype=np.int32),
    }


def _ego_poses(reader: TableReader, frames: list[Record]) -> Float64:
    """Rotation and translation (F, 7) of the vehicle at each frame.

    Raises:
        UserError: there is none for a frame, or there are two.
    """
    check = record_check("ego_pose")
    rows = {r["ego_pose_token"]: row for row, r in enumerate(frames)}
    poses: dict[str, list[float]] = {}
    for row, record in enumerate(reader.records("ego_pose")):
        token = record.get("token")
        if type(token) is not str or token in rows:
            check(record, row)
            if token in poses:
                twice("ego_pose", record["token"])
            poses[record["token"]] = record["rotation"] + record["translation"]
    return np.array(
        [referred(poses, "ego_pose", "sample_data", r, "ego_pose_token") for r in frames], dtype=np.float64
    ).reshape(-1, 7)


def _frame_columns(
    frames: list[Record], calibrations: Mapping[str, Record | None], ego_poses: Float64
) -> Columns:
    rows = {record["token"]: row for row, record in enumerate(frames)} | {"": -1}
    lidars = [lidar for r in frames if (lidar := calibrations[r["calibrated_sensor_token"]]) is not None]
    previous = np.array(
        [referred(rows, "sample_data", "sample_data", r, "prev") for r in frames], dtype=np.int32
    )
    refuse_first(
        is_in_circle(previous),
        lambda row: str(frames[row]["token"]),
        "sample_data",
        "prev leads in a circle; accepted: back to the first sweep of its scene",
    )
    return {
        "frame_paths": byte_strings([r["filename"] for r in frames], "sample_data", "filename"),
        "frame_times_us": np.array([r["timestamp"] for r in frames], dtype=np.int64),
        "frame_previous": previous,
        "frame_ego_rotations": np.ascontiguousarray(ego_poses[:, :4]),
        "frame_ego_translations": np.ascontiguousarray(ego_poses[:, 4:]),
        "frame_lidar_rotations": _vectors(lidars, "rotation", 4),
        "frame_lidar_translations": _vectors(lidars, "translation", 3),
    }


def _vectors(records: list[Record], key: str, length: int) -> Float64:
    return np.array([r[key] for r in records], dtype=np.float64).reshape(-1, length)


def _key_frame_columns(
    columns: Columns,
    frames: list[Record],
    samples: list[Record],
    sample_rows: Mapping[str, int],
    lidar_channel: str,
) -> Columns:
    key_frames = np.full(len(samples), -1, dtype=np.int32)
    for row, record in enumerate(frames):
        sample = referred(sample_rows, "sample", "sample_data", record, "sample_token")
        if record["is_key_frame"]:
            if key_frames[sample] >= 0:
                twice("sample_data", record["sample_token"], f"sample_token of a {lidar_channel} key frame")
            key_frames[sample] = row
    for row in np.flatnonzero(key_frames < 0):
        raise UserError(
            f"table sample_data has no {lidar_channel} key frame for sample {samples[row]['token']}"
        )
    at = {name: columns[f"frame_{name}"][key_frames] for name in _POSES}
    return {
        "sample_frames": key_frames,
        "sample_lidar_rotations": at["lidar_rotations"],
        "sample_lidar_translations": at["lidar_translations"],
        "sample_ego_rotations": at["ego_rotations"],
        "sample_ego_translations": at["ego_translations"],
        "sample_lidar_to_ego": pose_matrices(at["lidar_rotations"], at["lidar_translations"]),
        "sample_ego_to_global": pose_matrices(at["ego_rotations"], at["ego_translations"]),
    }


_POSES = ("lidar_rotations", "lidar_translations", "ego_rotations", "ego_translations")


def _instances(
    reader: TableReader, category_names: Mapping[str, str], task: DetectionTask
) -> dict[str, tuple[int, int, bool]]:
    """Row, class id and "is a bicycle rack" of each instance token."""
    instances = {}
    for row, (token, record) in enumerate(_by_token(reader, "instance").items()):
        name = referred(category_names, "category", "instance", record, "category_token")
        instances[token] = (row, task.class_of_category.get(name, -1), name == BIKE_RACK_CATEGORY)
    return instances
