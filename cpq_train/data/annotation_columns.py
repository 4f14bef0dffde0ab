"""The annotations of nuScenes' table as columns, sorted by sample. A annotations."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import UserError
from cpq_train.data.boxes import Float64, global_to_lidar
from cpq_train.data.records import Record, byte_strings, named, referred, refuse, refuse_first, twice

Columns = dict[str, NDArray[Any]]

_TABLE = "sample_annotation"
_AT_ONCE = 1 << 16
_MAX_VELOCITY_SPAN_S = 1.5
"""Neighbours further apart give no velocity (nuscenes-devkit, `box_velocity`); twice that if central."""


class AnnotationColumns:
    """Collects annotation records into flat arrays, a tenth of the memory of the records themselves.

    Args:
        sample_rows: row of each sample token.
        attribute_ids: id of each attribute token.
        instances: row, class id and "is a bicycle rack" of each instance token.
    """

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
        """Takes one record of the table, checked by itself.

        Raises:
            UserError: it refers to a record that does not exist, or has several attributes.
        """
        instance, class_id, is_bike_rack = referred(
            self._instances, "instance", _TABLE, record, "instance_token"
        )
        for link in (record["token"], record["prev"], record["next"]):
            self._links.append(self._token_ids.setdefault(link, len(self._token_ids)))
        self._integers.extend(
            (
                referred(self._sample_rows, "sample", _TABLE, record, "sample_token"),
                instance,
                class_id,
                is_bike_rack,
                self._attribute(record, class_id),
                record["num_lidar_pts"],
                record["num_radar_pts"],
            )
        )
        self._numbers.extend(record["translation"] + record["size"] + record["rotation"])

    def _attribute(self, record: Record, class_id: int) -> int:
        tokens = record["attribute_tokens"]
        if class_id >= 0 and len(tokens) > 1:
            raise UserError(
                f"annotation {record['token']} has {len(tokens)} attributes: expected none or one"
            )
        if not tokens:
            return -1
        if tokens[0] not in self._attribute_ids:
            accepted = "the token of a record of table attribute"
            refuse(f"{named(_TABLE, record)}: attribute_tokens", tokens[0], accepted)
        return self._attribute_ids[tokens[0]]

    def columns(self, columns: Columns) -> Columns:
        """The annotation columns; `columns` holds those of the samples.

        Raises:
            UserError: annotations contradict each other.
        """
        integers = np.array(self._integers, dtype=np.int64).reshape(-1, 7)
        numbers = np.array(self._numbers, dtype=np.float64).reshape(-1, 10)
        token_ids = np.array(self._links[::3], dtype=np.int64)
        tokens = byte_strings(list(self._token_ids), _TABLE, "token")[token_ids]
        _check_once(tokens, token_ids, "token")
        objects = integers[:, 0] * (1 + integers[:, 1].max(initial=0)) + integers[:, 1]
        _check_once(tokens, objects, "object of one sample, that of record")
        times_us = columns["sample_times_us"][integers[:, 0]]
        neighbours = self._neighbours(tokens, integers[:, 1], times_us)
        velocities = _velocities(*neighbours, numbers[:, :3], times_us)
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
                    for a in np.array_split(np.arange(len(samples)), 1 + len(samples) // _AT_ONCE)
                ]
            ),
        }

    def _neighbours(
        self, tokens: NDArray[np.bytes_], instances: NDArray[np.int64], times_us: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows (A,) of the annotations before and after each, -1 where there is none.

        Raises:
            UserError: a neighbour does not exist, is of another object, or not before or after.
        """
        links = np.array(self._links, dtype=np.int32).reshape(-1, 3)
        rows = np.full(len(self._token_ids), -1)
        rows[links[:, 0]] = np.arange(len(links))
        previous, following = rows[links[:, 1]], rows[links[:, 2]]
        ways = (("prev", "earlier", previous, -1), ("next", "later", following, 1))
        for column, (field, when, found, sign) in enumerate(ways, 1):
            is_neighbour = (
                (found >= 0) & (instances[found] == instances) & (sign * (times_us[found] - times_us) > 0)
            )
            refuse_first(
                ~is_neighbour & (links[:, column] != self._token_ids.get("", -1)),
                lambda row: tokens[row].decode(),
                _TABLE,
                f"{field} is no {when} annotation of its object; accepted: such a one, or an empty text",
            )
        return previous, following


def _check_once(tokens: NDArray[np.bytes_], numbers: NDArray[np.int64], what: str) -> None:
    """See that no two annotations (A,) have one number.

    Raises:
        UserError: two have.
    """
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(numbers[order[1:]] == numbers[order[:-1]])
    if len(again):
        twice(_TABLE, tokens[order[again[0]]].decode(), what)


def _velocities(
    previous: NDArray[np.int64],
    following: NDArray[np.int64],
    translations_m: Float64,
    times_us: NDArray[np.int64],
) -> Float64:
    """Velocities (A, 3) in m/s as `NuScenes.box_velocity` defines them, NaN where it gives none."""
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
