"""Builds the ground-truth database scene by scene, and merges the scenes.

A scene's part appears under its name only when it is complete: what is there is never built again.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.arrays import Column, check_columns, check_values, read_npz
from cpq_train.common.errors import UserError
from cpq_train.common.file_names import file_name
from cpq_train.common.folders import naming_full_disks, numbering_errors
from cpq_train.common.progress import say, track
from cpq_train.data.bad_sweeps import BadSweepLimit
from cpq_train.data.box_geometry import points_in_boxes
from cpq_train.data.column_files import Columns, Layout, checksum, write_columns
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.points.format import PointFormat
from cpq_train.data.sweeps import NUSCENES_POINTS, BadSweeps, load_sweeps

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Rows = NDArray[np.int64]

_OF_OBJECTS: Final = {
    "classes": Column("i", ("N",), 1),
    "boxes": Column("f", ("N", 9), 8),
    "num_points": Column("i", ("N",), 4),
    "sample_rows": Column("i", ("N",), 4),
    "tokens": Column("S", ("N",)),
}
_POINTS: Final = "points"
_BAD_SWEEPS: Final = {"bad_sweeps": Column("S", ("B",))}
"""Of a part: what is wrong with the clouds that it was built without."""


def layout(num_features: int) -> Layout:
    """The columns of a database, see `GtDatabase`. N objects, P points; S samples of the index, K classes."""
    return Layout(
        columns={
            **_OF_OBJECTS,
            "point_offsets": Column("i", ("N+1",), 8),
            "point_checksums": Column("u", ("N",), 4),
            _POINTS: _points(num_features),
        },
        ranges={"classes": (0, "K"), "num_points": (0, "P+1"), "sample_rows": (0, "S")},
        offsets={"point_offsets": "P"},
        in_pieces=(_POINTS,),
    )


def _points(num_features: int) -> Column:
    return Column("f", ("P", num_features), 4)


COLUMNS: tuple[str, ...] = tuple(layout(0).columns)
"""Files of a database."""


def object_annotations(index: NuScenesIndex, row: int) -> Rows:
    """Annotation rows (N,) of a sample's objects: of a detection class, with a LiDAR or a radar point.

    OpenPCDet's info files hold the same ones.
    """
    where = index.annotations(row)
    num_points = index.annotation_num_lidar_pts[where] + index.annotation_num_radar_pts[where]
    is_object = (index.annotation_classes[where] >= 0) & (num_points > 0)
    return np.flatnonzero(is_object) + np.int64(where.start)


def build_parts(
    index: NuScenesIndex,
    rows: Rows,
    folder: Path,
    num_sweeps: int,
    num_workers: int,
    points: PointFormat = NUSCENES_POINTS,
    max_bad_sweeps: float = 0.0,
) -> list[Path]:
    """Builds the parts that a folder lacks, and shows how far it has come.

    Args:
        index: the data set.
        rows: samples to take the objects of.
        folder: where the parts lie.
        num_sweeps: sweeps per sample.
        num_workers: processes; 0 works in this one.
        points: how they lie in the cloud files.
        max_bad_sweeps: share of the sweeps, of parts that are there already too, that may be left out because
            they cannot be used.

    Returns:
        The part of each scene, in the order of the index.

    Raises:
        CloudError: a cloud is missing or damaged, or more are than accepted.
    """
    from cpq_train.data.loader import FollowingLoader, start_worker  # torch, which the verb starts without

    scenes = np.unique(index.sample_scenes[rows])
    files = [folder / file_name(index.scene_names[scene].decode(), ".npz") for scene in scenes]
    held = [_held(file, index, len(points.features)) for file in files]
    tasks = [
        (file, rows[index.sample_scenes[rows] == scene])
        for file, scene, notes in zip(files, scenes, held, strict=True)
        if notes is None
    ]
    parts = _Parts(index, tasks, num_sweeps, points, skips_bad=max_bad_sweeps > 0)
    loader = FollowingLoader[list[str]](  # which hands errors over
        cast("Dataset[list[str]]", parts),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=start_worker,
    )
    if len(tasks) < len(files):
        say(f"objects of {len(files) - len(tasks)} of {len(files)} scenes are there already")
    built = track(loader, "Collecting objects (scenes)", len(tasks))
    limit = BadSweepLimit(max_bad_sweeps, len(rows) * num_sweeps)
    for _ in limit.watch({"bad_sweeps": notes or ()} for notes in chain(held, built)):
        pass
    return files


class _Parts:
    """Writes the part at a position when it is asked for, and hands on what is wrong with clouds it lacks."""

    def __init__(
        self,
        index: NuScenesIndex,
        tasks: list[tuple[Path, Rows]],
        num_sweeps: int,
        points: PointFormat,
        skips_bad: bool,
    ) -> None:
        self._index, self._tasks, self._how = index, tasks, (num_sweeps, points, skips_bad)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, position: int) -> list[str]:
        file, rows = self._tasks[position]
        part = _joined(_objects(self._index, int(row), *self._how) for row in rows)
        _write(file, part)
        return _bad_sweeps(part)


def _objects(
    index: NuScenesIndex, row: int, num_sweeps: int, points_format: PointFormat, skips_bad: bool
) -> Columns:
    """The objects of one sample, and their points relative to the centres of their boxes.

    Without its key frame a sample has no objects: their points would all be of the past.
    """
    bad: BadSweeps | None = {} if skips_bad else None
    cloud = load_sweeps(index, row, num_sweeps, points_format, bad)
    annotations = object_annotations(index, row)
    if bad and int(index.sample_frames[row]) in bad:
        annotations = annotations[:0]
    boxes = index.annotation_boxes[annotations]
    points = [cloud[rows] for rows in points_in_boxes(cloud, boxes)]
    for own, box in zip(points, boxes, strict=True):
        own[:, :3] -= box[:3].astype(np.float32)
    return {
        "classes": index.annotation_classes[annotations],
        "boxes": boxes,
        "num_points": np.array([len(own) for own in points], dtype=np.int32),
        "sample_rows": np.full(len(boxes), row, dtype=np.int32),
        "tokens": index.annotation_tokens[annotations],
        "points": np.concatenate([cloud[:0], *points]),
        "bad_sweeps": np.array([os.fsencode(note) for note in (bad or {}).values()], dtype=np.bytes_),
    }


def _bad_sweeps(part: Columns) -> list[str]:
    return [os.fsdecode(note) for note in part["bad_sweeps"].tolist()]


def _joined(parts: Iterable[Columns]) -> Columns:
    parts = list(parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write(file: Path, part: Columns) -> None:
    partial = file.with_name(f".{uuid.uuid4().hex}.npz")
    content = io.BytesIO()  # on a full disk NumPy would leave an archive open, which complains later
    np.savez(content, **part)
    size = content.getbuffer().nbytes
    what, kept = f"objects of {file.stem}", "what other scenes gave"
    try:
        with naming_full_disks(what, file.parent, size, partial, kept), partial.open("wb") as stream:
            stream.write(content.getbuffer())
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def merge_parts(files: list[Path], folder: Path, num_features: int) -> None:
    """Writes the columns of a database from its parts; the points pass through memory scene by scene."""
    folder.mkdir()
    of_points = {_POINTS: _points(num_features), "num_points": _OF_OBJECTS["num_points"]}
    columns = _joined(_read(file, _OF_OBJECTS) for file in files)
    columns["point_offsets"] = np.concatenate([[0], np.cumsum(columns["num_points"], dtype=np.int64)])
    shape = (int(columns["point_offsets"][-1]), num_features)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    checksums: list[int] = []
    with (folder / "points.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for file in track(files, "Merging scenes"):
            part = _read(file, of_points)
            with numbering_errors():
                part["points"].tofile(stream)
            checksums += map(checksum, np.split(part["points"], np.cumsum(part["num_points"])[:-1]))
        os.fsync(stream.fileno())
    columns["point_checksums"] = np.array(checksums, dtype=np.uint32)
    write_columns(folder, columns, {}, {"points": (np.dtype("<f4"), shape)})


def _held(file: Path, index: NuScenesIndex, num_features: int) -> list[str] | None:
    """What is wrong with the clouds that the part of a scene was built without; None where it is not there.

    Whether it is there is seen by the checksums that it holds, and by what a part is.
    """
    if not os.path.lexists(file):
        return None
    try:
        part = _read(file, {**_OF_OBJECTS, **_BAD_SWEEPS, _POINTS: _points(num_features)})
        _check(part, index, str(file))
    except UserError as error:
        say(f"{file} is damaged and built anew: {error}")
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file, ignore_errors=True)
        return None
    return _bad_sweeps(part)


def _check(part: Columns, index: NuScenesIndex, where: str) -> None:
    """See that a part is of objects, and of their points: it may be a stranger's.

    Raises:
        UserError: it is not.
    """
    check_values(part["classes"], 0, len(index.task.names) - 1, f"{where}: classes")
    check_values(part["sample_rows"], 0, len(index) - 1, f"{where}: sample_rows")
    check_values(part["num_points"], 0, len(part["points"]), f"{where}: num_points")
    num_points = int(part["num_points"].sum(dtype=np.int64))
    if num_points != len(part["points"]):
        raise UserError(f"{where}: num_points add up to {num_points}; accepted: {len(part['points'])}")


def _read(file: Path, kinds: Mapping[str, Column]) -> Columns:
    """Some columns of a part.

    Raises:
        UserError: they are missing, or no columns of their kind.
    """
    part = read_npz(file, "part", kinds)
    check_columns(part, kinds, str(file))
    return part
