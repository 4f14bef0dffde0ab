"""The ground-truth database: the points of every annotated object of a split, for sampling them into scenes.

It lies beside the index as a few memory-mapped columns. Its name depends on the tables, the split and the
number of sweeps, so that one of other data is never used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from cpq_train.common.console import print_plain
from cpq_train.common.detection_task import NUSCENES, DetectionClass, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.folders import naming_full_disks
from cpq_train.common.nuscenes import LIDAR_TOP
from cpq_train.common.progress import say
from cpq_train.data import derived
from cpq_train.data.bad_sweeps import check_share
from cpq_train.data.column_files import CheckedColumns, DamageError, checksum, open_columns
from cpq_train.data.gt_database_parts import COLUMNS, build_parts, layout, merge_parts, object_annotations
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.points.checks import check_files
from cpq_train.data.points.format import NUSCENES_COLUMNS, PointFormat
from cpq_train.data.selection import Limits, MissingScenes, Selection, SplitNames
from cpq_train.data.sweeps import MAX_NUM_SWEEPS, NUSCENES_POINTS

_SCHEMA = 2
"""Counted up when content or columns change, so that older databases are not used."""


class GtKind(NamedTuple):
    """What is known of a database before it is opened.

    Attributes:
        num_samples: of the index that `sample_rows` are rows of.
        command: what builds it.
        task: whose ids its classes are.
        num_features: F of its points.
    """

    num_samples: int
    command: str = ""
    task: DetectionTask = NUSCENES
    num_features: int = len(NUSCENES_POINTS.features)


@dataclass(frozen=True)
class _Source:
    """What a database is made of; `skipped` are names of scenes that are left out.

    A few sweeps may be left out too, which makes it no other one: `max_bad_sweeps` is no part of the name.
    """

    index: NuScenesIndex
    split: str
    num_sweeps: int
    points: PointFormat
    skipped: Sequence[str]
    max_bad_sweeps: float = 0.0

    @property
    def name(self) -> str:
        """Of the folder of the database: only what is not usual counts beside the first four."""
        index, points = self.index, self.points
        source: list[Any] = [_SCHEMA, index.fingerprint, self.split, self.num_sweeps]
        if not points.is_nuscenes:
            source += [points.columns, points.intensity_scale]
        if index.splits.is_own(self.split):
            source.append({"scenes": index.splits.scenes_of(self.split)})
        if index.lidar_channel != LIDAR_TOP or index.task != NUSCENES:
            source.append({index.lidar_channel: index.task.to_dict()})
        if self.skipped:
            source.append({"skipped": list(self.skipped)})
        return f"gt-{hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]}"

    def kind(self, cache_dir: str | Path | None) -> GtKind:
        """What is known of it."""
        return GtKind(len(self.index), self._command(cache_dir), self.index.task, len(self.points.features))

    def _command(self, cache_dir: str | Path | None) -> str:
        index, points = self.index, self.points
        options = {
            "root": str(index.root),
            "version": index.version,
            "split": self.split,
            "num_sweeps": str(self.num_sweeps),
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "point_columns": None if points.columns == NUSCENES_COLUMNS else str(points),
            "intensity_scale": None if points.intensity_scale == 1 else repr(points.intensity_scale),
            "drop_nonfinite_points": "true" if points.drop_nonfinite else None,
            "classes": None if index.task == NUSCENES else json.dumps(index.task.to_dict()),
            "lidar_channel": None if index.lidar_channel == LIDAR_TOP else index.lidar_channel,
            "missing_scenes": "skip" if self.skipped else None,
            "max_bad_sweeps": repr(self.max_bad_sweeps) if self.max_bad_sweeps else None,
        }
        said = (f"--{name} {quote(value)}" for name, value in options.items() if value is not None)
        return f"python -m cpq_train build-gt-database {' '.join(said)}"


@dataclass(frozen=True)
class GtDatabase(CheckedColumns):
    """The objects of a split, by scene, sample and annotation in the order of the index.

    All arrays are memory-mapped and read-only. N objects, P points; those of object `n` are rows
    `point_offsets[n] : point_offsets[n + 1]` of `points`.
    """

    folder: Path
    classes: NDArray[np.int8] = field(repr=False)
    """(N,) class id of the task."""
    boxes: NDArray[np.float64] = field(repr=False)
    """(N, 9) box rows in the LiDAR frame of the sample's key frame; NaN where the velocity is unknown."""
    num_points: NDArray[np.int32] = field(repr=False)
    """(N,) over all sweeps."""
    sample_rows: NDArray[np.int32] = field(repr=False)
    """(N,) rows of the index."""
    tokens: NDArray[np.bytes_] = field(repr=False)
    """(N,) of the annotations."""
    point_offsets: NDArray[np.int64] = field(repr=False)
    """(N + 1,)"""
    point_checksums: NDArray[np.uint32] = field(repr=False)
    """(N,) CRC-32 of the points of each object."""
    points: NDArray[np.float32] = field(repr=False)
    """(P, F) x, y, z in metres from the centre of the box, not rotated; further features; time lag in s."""
    kind: GtKind = field(default=GtKind(0), repr=False)
    """What was known of it before it was opened."""

    @property
    def _remedy(self) -> str:  # type: ignore[override]
        return f"build the GT database anew with\n  {self.kind.command}"

    @property
    def task(self) -> DetectionTask:
        """Whose classes these are."""
        return self.kind.task

    def __len__(self) -> int:
        return len(self.classes)

    def __reduce__(self) -> tuple[Callable[..., GtDatabase], tuple[Path, GtKind]]:
        """Pickles as a path: another process maps the same files."""
        return _load, (self.folder, self.kind)

    def points_of(self, row: int) -> NDArray[np.float32]:
        """A copy of the points (P, F) of the object at a row, moved to where they were seen.

        Raises:
            DamageError: they are not those that were written.
        """
        where = slice(self.point_offsets[row], self.point_offsets[row + 1])
        points: NDArray[np.float32] = np.array(self.points[where])
        if checksum(points) != self.point_checksums[row]:
            raise DamageError(
                f"the GT database {self.folder} is damaged: the points of object {row} are others; "
                f"{self._remedy}"
            )
        points[:, :3] += self.boxes[row, :3].astype(np.float32)
        return points


def build_gt_database(
    root: Path,
    version: str = "v1.0-trainval",
    split: str = "train",
    num_sweeps: int = MAX_NUM_SWEEPS,
    num_workers: int = 4,
    cache_dir: Path | None = None,
    classes: dict[str, DetectionClass] | None = None,
    lidar_channel: str = LIDAR_TOP,
    point_columns: tuple[str, ...] = NUSCENES_COLUMNS,
    intensity_scale: float = 1.0,
    drop_nonfinite_points: bool = False,
    missing_scenes: MissingScenes = "error",
    max_bad_sweeps: float = 0.0,
) -> None:
    """Collects the points of every annotated object of a split, for `data.gt_sampling`.

    Scenes that are finished are kept, so that a build that was interrupted goes on where it was; the result
    is the same, byte for byte. A database that is there already is left as it is.

    Args:
        root: The data root, the folder that holds `samples/`, `sweeps/` and the version's folder of tables.
        version: Name of the folder of tables.
        split: Official split, or one of `splits.json`, that will be trained on; several joined by "+".
        num_sweeps: LiDAR sweeps per sample, as `data.num_sweeps` of the training.
        num_workers: Processes; 0 works in this one.
        cache_dir: Where to keep the database, as `data.cache_dir` of the training; by default the data root,
            or the user's cache if that is read-only.
        classes: As `data.classes` of the training.
        lidar_channel: As `data.lidar_channel` of the training.
        point_columns: Of the cloud files, as `data.point_columns` of the training.
        intensity_scale: As `data.intensity_scale` of the training.
        drop_nonfinite_points: As `data.drop_nonfinite_points` of the training.
        missing_scenes: As `data.missing_scenes` of the training.
        max_bad_sweeps: Share of the sweeps of the split that may be missing or damaged; each is left out and
            named. Of a sample whose key frame is, no object is taken.

    Raises:
        UserError: The root, the version or the split is missing, there is no object or no place to write,
            or a number is out of range.
        CloudError: A cloud is missing or damaged, or not of these columns; or more are than accepted.
    """
    points = PointFormat(point_columns, intensity_scale, drop_nonfinite_points)
    _check_numbers(num_sweeps, num_workers, max_bad_sweeps)
    index = open_index(root, version, cache_dir, DetectionTask.of(classes), lidar_channel)
    check_files(index, points, skips_bad=max_bad_sweeps > 0)
    selection = Selection(index, SplitNames.only(split), Limits(missing_scenes=missing_scenes), num_sweeps)
    rows = selection.train_rows
    if not any(len(object_annotations(index, row)) for row in rows):
        raise UserError(f"split {split!r} of {version} in {root} holds no annotated object of a class")
    source = _Source(index, split, num_sweeps, points, selection.skipped(split), max_bad_sweeps)
    places, kind = derived.homes(index.root, version, cache_dir), source.kind(cache_dir)
    found = (_whole(folder, kind) for folder in derived.find(places, source.name))
    database = next(filter(None, found), None)
    if database is None:
        parts = derived.parts_folder(places, source.name)
        folder = parts.with_name(source.name)
        _build(source, rows, parts, folder, num_workers)
        database = _load(folder, kind)
    _print_counts(database)


def _check_numbers(num_sweeps: int, num_workers: int, max_bad_sweeps: float) -> None:
    check_share(max_bad_sweeps)
    if not 1 <= num_sweeps <= MAX_NUM_SWEEPS:
        raise UserError(f"num_sweeps is {num_sweeps}: expected 1 to {MAX_NUM_SWEEPS}")
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}: expected 0 or more")


def _build(source: _Source, rows: NDArray[np.int64], parts: Path, folder: Path, num_workers: int) -> None:
    """Makes a database from the parts of its scenes, which are removed behind it."""
    merged = parts / uuid.uuid4().hex
    try:
        files = build_parts(
            source.index, rows, parts, source.num_sweeps, num_workers, source.points, source.max_bad_sweeps
        )
        num_bytes = sum(file.stat().st_size for file in files)
        with naming_full_disks("the GT database", folder.parent, num_bytes, merged, "what its scenes gave"):
            merge_parts(files, merged, len(source.points.features))
            derived.publish(merged, folder)
    except OSError:
        if not folder.is_dir():  # made by another process, which has removed the parts
            raise
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    shutil.rmtree(parts, ignore_errors=True)


def open_gt_database(
    index: NuScenesIndex,
    split: str,
    num_sweeps: int,
    cache_dir: str | Path | None = None,
    points: PointFormat = NUSCENES_POINTS,
    skipped: Sequence[str] = (),
    max_bad_sweeps: float = 0.0,
) -> GtDatabase:
    """Opens the database of a split, which `build_gt_database` has made.

    Args:
        index: the data set.
        split: the split.
        num_sweeps: of each sample.
        cache_dir: where it is kept, as `build_gt_database` has it.
        points: how points lie in cloud files.
        skipped: names of the scenes of the split that are left out.
        max_bad_sweeps: share of its sweeps that may be left out, for the command that builds it.

    Raises:
        UserError: there is none of the present tables; the message is the command that builds it.
    """
    source = _Source(index, split, num_sweeps, points, skipped, max_bad_sweeps)
    kind, reasons = source.kind(cache_dir), []
    for folder in derived.find(derived.homes(index.root, index.version, cache_dir), source.name):
        try:
            return _load(folder, kind)
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f"{'; '.join(reasons)}; build the GT database anew with\n  {kind.command}")
    columns = "" if points.is_nuscenes else f" and data.point_columns {points}"
    raise UserError(
        f"data.gt_sampling needs the GT database of split {split!r} with {num_sweeps} sweeps"
        f"{columns}, and {index.root} has none of its present tables; build it with\n  {kind.command}"
    )


def _whole(folder: Path, kind: GtKind) -> GtDatabase | None:
    """A database that is what was written; a damaged one is removed, and said."""
    try:
        database = _load(folder, kind)
        for row in range(len(database)):
            database.points_of(row)
        for name in COLUMNS:
            getattr(database, name)
    except UserError as error:
        say(f"the GT database is built anew: {str(error).partition('; ')[0]}")
        derived.discard(folder)
        return None
    return database


def _load(folder: Path, kind: GtKind) -> GtDatabase:
    """Maps a database.

    Raises:
        UserError: it is damaged.
    """
    lengths = {"S": kind.num_samples, "K": len(kind.task.names)}
    unchecked = open_columns(folder, layout(kind.num_features), lengths)[1]
    database = object.__new__(GtDatabase)
    database.__dict__.update(folder=folder, kind=kind, _unchecked=unchecked)
    return database


def _print_counts(database: GtDatabase) -> None:
    table = Table()
    for heading in ("class", "objects", "of 5 points or more"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for class_id, name in enumerate(database.task.names):
        num_points = database.num_points[database.classes == class_id]
        table.add_row(name, str(len(num_points)), str(np.count_nonzero(num_points >= 5)))
    text = f"GT database: {database.folder} ({len(database.points)} points)"
    print_plain(text, table)
