"""Turns nuScenes' tables into columns: one array per property, rows addressed by number instead of token.

Row numbers: a sample is a row of table `sample`, a frame is a LIDAR_TOP row of `sample_data` (key frames
and sweeps), a scene is a row of `scene`. Annotations are sorted by sample, in table order within it. Shape
letters: S samples, F frames, A annotations.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import ATTRIBUTES, BIKE_RACK_CATEGORY, CATEGORY_TO_CLASS, DETECTION_CLASSES
from cpq_train.data.boxes import Float64, global_to_lidar, pose_matrices
from cpq_train.data.tables import Record, TableReader

Columns = dict[str, NDArray[Any]]

_LIDAR = "LIDAR_TOP"
_FRAME_KEYS = (
    "token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "is_key_frame",
    "filename", "prev",
)  # fmt: skip
_ANNOTATIONS_AT_ONCE = 1 << 16
_MAX_VELOCITY_SPAN_S = 1.5
"""Neighbours further apart give no velocity (nuscenes-devkit, `box_velocity`); twice that if central."""


def read_columns(reader: TableReader) -> Columns:
    """Reads all tables and returns the columns that `NuScenesIndex` documents.

    Raises:
        UserError: a table is damaged, or refers to a record that does not exist.
    """
    category_names = {r["token"]: r["name"] for r in reader.records("category")}
    attribute_ids = {r["token"]: _attribute_id(r["name"]) for r in reader.records("attribute")}
    lidars = {r["token"] for r in reader.records("sensor") if r["channel"] == _LIDAR}
    calibrations = {r["token"]: r for r in reader.records("calibrated_sensor") if r["sensor_token"] in lidars}
    scenes = {r["token"]: r["name"] for r in reader.records("scene")}
    samples = list(reader.records("sample"))
    frames = [
        {key: record[key] for key in _FRAME_KEYS}
        for record in reader.records("sample_data")
        if record["calibrated_sensor_token"] in calibrations
    ]

    columns = _sample_columns(samples, scenes)
    sample_rows = {record["token"]: row for row, record in enumerate(samples)}
    columns |= _frame_columns(frames, calibrations, _ego_poses(reader, frames))
    columns |= _key_frame_columns(columns, frames, samples, sample_rows)
    del frames, samples  # half a gigabyte for the whole of nuScenes
    annotations = _Annotations(sample_rows, attribute_ids, _instances(reader, category_names))
    for record in reader.records("sample_annotation"):
        annotations.add(record)
    return columns | annotations.columns(columns)


def _attribute_id(name: str) -> int:
    return ATTRIBUTES.index(name) if name in ATTRIBUTES else -1


def _row(rows: Mapping[str, int], token: str, table: str, user: str) -> int:
    """The row of a token, with an error a person can act on.

    Raises:
        UserError: the table has no such token.
    """
    if token not in rows:
        raise UserError(f"table {table} has no record {token!r}, which a record of {user} refers to")
    return rows[token]


def _byte_strings(strings: list[str]) -> NDArray[np.bytes_]:
    return np.array([string.encode() for string in strings], dtype=np.bytes_)


def _sample_columns(samples: list[Record], scenes: Mapping[str, str]) -> Columns:
    scene_rows = {token: row for row, token in enumerate(scenes)}
    return {
        "scene_names": _byte_strings(list(scenes.values())),
        "sample_tokens": _byte_strings([r["token"] for r in samples]),
        "sample_times_us": np.array([r["timestamp"] for r in samples], dtype=np.int64),
        "sample_scenes": np.array(
            [_row(scene_rows, r["scene_token"], "scene", "sample") for r in samples], dtype=np.int32
        ),
    }


def _ego_poses(reader: TableReader, frames: list[Record]) -> Float64:
    """Rotation and translation (F, 7) of the vehicle at each frame."""
    rows = {r["ego_pose_token"]: row for row, r in enumerate(frames)}
    poses = np.full((len(frames), 7), np.nan)
    for record in reader.records("ego_pose"):
        if record["token"] in rows:
            poses[rows[record["token"]]] = record["rotation"] + record["translation"]
    poses = poses[[rows[r["ego_pose_token"]] for r in frames]]  # frames may share one
    for row in np.flatnonzero(np.isnan(poses[:, 0])):
        token = frames[row]["ego_pose_token"]
        raise UserError(f"table ego_pose has no record {token!r}, which a record of sample_data refers to")
    return poses


def _frame_columns(frames: list[Record], calibrations: Mapping[str, Record], ego_poses: Float64) -> Columns:
    rows = {record["token"]: row for row, record in enumerate(frames)} | {"": -1}
    lidars = [calibrations[r["calibrated_sensor_token"]] for r in frames]
    return {
        "frame_paths": _byte_strings([r["filename"] for r in frames]),
        "frame_times_us": np.array([r["timestamp"] for r in frames], dtype=np.int64),
        "frame_previous": np.array(
            [_row(rows, r["prev"], "sample_data", "sample_data") for r in frames], dtype=np.int32
        ),
        "frame_ego_rotations": np.ascontiguousarray(ego_poses[:, :4]),
        "frame_ego_translations": np.ascontiguousarray(ego_poses[:, 4:]),
        "frame_lidar_rotations": _vectors(lidars, "rotation", 4),
        "frame_lidar_translations": _vectors(lidars, "translation", 3),
    }


def _vectors(records: list[Record], key: str, length: int) -> Float64:
    return np.array([r[key] for r in records], dtype=np.float64).reshape(-1, length)


def _key_frame_columns(
    columns: Columns, frames: list[Record], samples: list[Record], sample_rows: Mapping[str, int]
) -> Columns:
    key_frames = np.full(len(samples), -1, dtype=np.int32)
    for row, record in enumerate(frames):
        if record["is_key_frame"]:
            key_frames[_row(sample_rows, record["sample_token"], "sample", "sample_data")] = row
    for row in np.flatnonzero(key_frames < 0):
        raise UserError(f"table sample_data has no {_LIDAR} key frame for sample {samples[row]['token']}")
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


def _instances(reader: TableReader, category_names: Mapping[str, str]) -> dict[str, tuple[int, int, bool]]:
    """Row, class id and "is a bicycle rack" of each instance token."""
    instances = {}
    for row, record in enumerate(reader.records("instance")):
        name = category_names.get(record["category_token"], "")
        detection_class = CATEGORY_TO_CLASS.get(name)
        class_id = -1 if detection_class is None else DETECTION_CLASSES.index(detection_class)
        instances[record["token"]] = (row, class_id, name == BIKE_RACK_CATEGORY)
    return instances


class _Annotations:
    """Collects annotation records into flat arrays, a tenth of the memory of the records themselves."""

    def __init__(
        self,
        sample_rows: Mapping[str, int],
        attribute_ids: Mapping[str, int],
        instances: Mapping[str, tuple[int, int, bool]],
    ) -> None:
        self._sample_rows = sample_rows
        self._attribute_ids = attribute_ids
        self._instances = instances
        self._token_ids: dict[str, int] = {}  # of each token that a record has or names as a neighbour
        self._links = array("i")
        self._integers = array("q")
        self._numbers = array("d")

    def add(self, record: Record) -> None:
        """Takes one record of table `sample_annotation`."""
        token = record["token"]
        if record["instance_token"] not in self._instances:
            raise UserError(
                f"table instance has no record {record['instance_token']!r} of annotation {token}"
            )
        instance, class_id, is_bike_rack = self._instances[record["instance_token"]]
        for link in (token, record["prev"], record["next"]):
            self._links.append(self._token_ids.setdefault(link, len(self._token_ids)))
        self._integers.extend(
            (
                _row(self._sample_rows, record["sample_token"], "sample", "sample_annotation"),
                instance,
                class_id,
                is_bike_rack,
                self._attribute(record, class_id),
                record["num_lidar_pts"],
                record["num_radar_pts"],
            )
        )
        for key in ("translation", "size", "rotation"):
            self._numbers.extend(record[key])

    def _attribute(self, record: Record, class_id: int) -> int:
        tokens = record["attribute_tokens"]
        if class_id >= 0 and len(tokens) > 1:
            raise UserError(
                f"annotation {record['token']} has {len(tokens)} attributes: expected none or one"
            )
        return self._attribute_ids.get(tokens[0], -1) if tokens else -1

    def columns(self, columns: Columns) -> Columns:
        """The annotation columns, sorted by sample; `columns` holds those of the samples."""
        integers = np.array(self._integers, dtype=np.int64).reshape(-1, 7)
        numbers = np.array(self._numbers, dtype=np.float64).reshape(-1, 10)
        links = np.array(self._links, dtype=np.int32).reshape(-1, 3)
        tokens = _byte_strings(list(self._token_ids))[links[:, 0]]
        velocities = self._velocities(links, numbers[:, :3], columns["sample_times_us"][integers[:, 0]])
        order = np.argsort(integers[:, 0], kind="stable")
        integers, numbers, velocities = integers[order], numbers[order], velocities[order]
        samples, translations, sizes, rotations = (
            integers[:, 0],
            numbers[:, :3],
            numbers[:, 3:6],
            numbers[:, 6:],
        )
        del self._token_ids, self._links
        lidar_to_global = columns["sample_ego_to_global"] @ columns["sample_lidar_to_ego"]
        counts = np.bincount(samples, minlength=len(columns["sample_tokens"]))
        return {
            "annotation_offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "annotation_tokens": tokens[order],
            "annotation_instances": integers[:, 1].astype(np.int32),
            "annotation_classes": integers[:, 2].astype(np.int8),
            "annotation_is_bike_rack": integers[:, 3].astype(np.bool_),
            "annotation_attributes": integers[:, 4].astype(np.int8),
            "annotation_num_lidar_pts": integers[:, 5].astype(np.int32),
            "annotation_num_radar_pts": integers[:, 6].astype(np.int32),
            "annotation_translations": np.ascontiguousarray(translations),
            "annotation_sizes_wlh": np.ascontiguousarray(sizes),
            "annotation_rotations": np.ascontiguousarray(rotations),
            "annotation_velocities": np.ascontiguousarray(velocities[:, :2]),
            "annotation_boxes": np.concatenate(
                [
                    global_to_lidar(
                        translations[a], sizes[a], rotations[a], velocities[a], lidar_to_global[samples[a]]
                    )
                    for a in np.array_split(np.arange(len(samples)), 1 + len(samples) // _ANNOTATIONS_AT_ONCE)
                ]
            ),
        }

    def _velocities(
        self, links: NDArray[np.int32], translations_m: Float64, times_us: NDArray[np.int64]
    ) -> Float64:
        """Velocities (A, 3) in m/s as `NuScenes.box_velocity` defines them, NaN where it gives none."""
        rows = np.full(len(self._token_ids), -1)
        rows[links[:, 0]] = np.arange(len(links))
        previous, following = rows[links[:, 1:]].T
        itself = np.arange(len(previous))
        first = np.where(previous < 0, itself, previous)
        last = np.where(following < 0, itself, following)
        times_s = 1e-6 * times_us
        span_s = times_s[last] - times_s[first]
        is_central = (previous >= 0) & (following >= 0)
        is_known = (first != last) & (span_s <= np.where(is_central, 2, 1) * _MAX_VELOCITY_SPAN_S)
        velocities = np.full((len(itself), 3), np.nan)
        moved_m = translations_m[last] - translations_m[first]
        velocities[is_known] = moved_m[is_known] / span_s[is_known, None]
        return velocities
