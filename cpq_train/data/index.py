"""The index of a nuScenes data set: its tables as memory-mapped columns, built once for all processes.

`open_index` finds the index of a data root or builds it. It lies in `<root>/.cpq_train/<version>/`, or in
the user's cache where the root cannot be written. A folder appears there under its final name only when it
is complete, and the name depends on the size and the modification time of every table, so that neither a
half-built nor an outdated one is ever read. Those tables whose inodes and change times it has not seen yet
are hashed once: a copy of them shares the index, and an edit that keeps size and time is found. A damaged
index is built anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.common.folders import naming_full_disks
from cpq_train.common.nuscenes import LIDAR_TOP
from cpq_train.common.progress import progress, say
from cpq_train.common.schema import keys, list_of, mapping_to, validated
from cpq_train.data import derived
from cpq_train.data.column_files import CheckedColumns, open_columns, write_columns
from cpq_train.data.index_columns import LAYOUT
from cpq_train.data.splits import SPLITS_FILE, Splits, official_splits
from cpq_train.data.tables import Table, TableReader, find_tables, fingerprint

_SCHEMA = 2
"""Counted up when the columns change, so that older indexes are built anew."""

_META: TypeAdapter[Any] = TypeAdapter(keys({"fingerprint": str, "splits": mapping_to(list_of(str))}))

_PROGRESS_FROM_BYTES = 64 << 20
"""Smaller tables are read within a few seconds and need no progress shown."""


@dataclass(frozen=True)
class NuScenesIndex(CheckedColumns):
    """Columns over the samples, LiDAR frames, scenes and annotations of one version of a data set.

    All arrays are memory-mapped and read-only. S samples in table order, F frames of the LiDAR (key frames
    and sweeps), A annotations sorted by sample: those of sample `s` are rows `annotation_offsets[s] :
    annotation_offsets[s + 1]`. Strings are UTF-8 bytes. Quaternions are `w x y z`, as in the tables; lengths
    in metres, velocities in m/s.
    """

    _remedy = "start again to make it anew"

    folder: Path
    """Where the columns lie."""
    root: Path
    """The data root; `frame_paths` are relative to it."""
    version: str
    fingerprint: str
    """SHA-256 over the contents of the tables."""
    splits: Splits
    """Which scenes belong to which split."""
    task: DetectionTask
    """The classes of the annotations."""
    lidar_channel: str
    """Whose frames these are."""

    scene_names: NDArray[np.bytes_] = field(repr=False)
    sample_tokens: NDArray[np.bytes_] = field(repr=False)
    """(S,)"""
    sample_times_us: NDArray[np.int64] = field(repr=False)
    """(S,) timestamps of table `sample`, in microseconds."""
    sample_scenes: NDArray[np.int32] = field(repr=False)
    """(S,) rows of `scene_names`."""
    sample_frames: NDArray[np.int32] = field(repr=False)
    """(S,) frame row of the LiDAR key frame."""
    sample_lidar_rotations: NDArray[np.float64] = field(repr=False)
    """(S, 4) LiDAR to ego vehicle."""
    sample_lidar_translations: NDArray[np.float64] = field(repr=False)
    """(S, 3)"""
    sample_ego_rotations: NDArray[np.float64] = field(repr=False)
    """(S, 4) ego vehicle to global, at the time of the LiDAR key frame."""
    sample_ego_translations: NDArray[np.float64] = field(repr=False)
    """(S, 3)"""
    sample_lidar_to_ego: NDArray[np.float64] = field(repr=False)
    """(S, 4, 4) the same poses as matrices."""
    sample_ego_to_global: NDArray[np.float64] = field(repr=False)
    """(S, 4, 4)"""
    frame_paths: NDArray[np.bytes_] = field(repr=False)
    """(F,) cloud files relative to the root."""
    frame_times_us: NDArray[np.int64] = field(repr=False)
    """(F,) timestamps of table `sample_data`, in microseconds."""
    frame_previous: NDArray[np.int32] = field(repr=False)
    """(F,) frame row of the sweep before, -1 at a scene's start."""
    frame_ego_rotations: NDArray[np.float64] = field(repr=False)
    """(F, 4)"""
    frame_ego_translations: NDArray[np.float64] = field(repr=False)
    """(F, 3)"""
    frame_lidar_rotations: NDArray[np.float64] = field(repr=False)
    """(F, 4)"""
    frame_lidar_translations: NDArray[np.float64] = field(repr=False)
    """(F, 3)"""
    annotation_offsets: NDArray[np.int64] = field(repr=False)
    """(S + 1,)"""
    annotation_tokens: NDArray[np.bytes_] = field(repr=False)
    annotation_instances: NDArray[np.int32] = field(repr=False)
    """(A,) row of table `instance`: the same number for the same object."""
    annotation_classes: NDArray[np.int8] = field(repr=False)
    """(A,) class id of the task, -1 for categories outside of it."""
    annotation_is_bike_rack: NDArray[np.bool_] = field(repr=False)
    annotation_attributes: NDArray[np.int8] = field(repr=False)
    """(A,) attribute id of the task, -1 for none."""
    annotation_num_lidar_pts: NDArray[np.int32] = field(repr=False)
    annotation_num_radar_pts: NDArray[np.int32] = field(repr=False)
    annotation_boxes: NDArray[np.float64] = field(repr=False)
    """(A, 9) `x y z l w h yaw vx vy` in the key frame's LiDAR frame; velocity over ground, else NaN."""
    annotation_translations: NDArray[np.float64] = field(repr=False)
    """(A, 3) global frame, as are the following."""
    annotation_sizes_wlh: NDArray[np.float64] = field(repr=False)
    """(A, 3) width, length, height."""
    annotation_rotations: NDArray[np.float64] = field(repr=False)
    """(A, 4)"""
    annotation_velocities: NDArray[np.float64] = field(repr=False)
    """(A, 2) as nuscenes-devkit's `box_velocity` estimates them, NaN where it gives none."""

    def __len__(self) -> int:
        return len(self.sample_tokens)

    def __reduce__(self) -> tuple[Callable[..., NuScenesIndex], tuple[Path, Path, str, DetectionTask, str]]:
        """Pickles as a path: another process maps the same files."""
        return _load, (self.folder, self.root, self.version, self.task, self.lidar_channel)

    def sample_token(self, row: int) -> str:
        """Token of the sample at a row."""
        return str(self.sample_tokens[row], "utf-8")

    def scene_name(self, row: int) -> str:
        """Name of the scene that the sample at a row belongs to."""
        return str(self.scene_names[self.sample_scenes[row]], "utf-8")

    def frame_path(self, frame: int) -> Path:
        """The cloud file of a frame row."""
        return self.root / str(self.frame_paths[frame], "utf-8")

    def annotations(self, row: int) -> slice:
        """Where the annotations of the sample at a row lie in the annotation columns."""
        return slice(int(self.annotation_offsets[row]), int(self.annotation_offsets[row + 1]))

    def sample_rows(self, split: str | None = None, tokens: list[str] | None = None) -> NDArray[np.int64]:
        """Rows of the samples of a split, or of the given tokens.

        Args:
            split: a split, or several joined by "+", see `Splits`. None is the whole data set.
            tokens: sample tokens; only these, in this order. All must belong to the split.

        Raises:
            UserError: the split is unknown or holds no sample here, or a token is unknown or outside of it.
        """
        rows = np.arange(len(self)) if split is None else self._split_rows(split)
        if tokens is None:
            return rows
        within = f"{self.version} of {self.root}" if split is None else f"split {split!r} of {self.version}"
        known = set(rows.tolist())
        for token in tokens:
            if self._rows_by_token.get(token) not in known:
                raise UserError(f"sample token {token!r} is not one of the {len(rows)} samples in {within}")
        return np.array([self._rows_by_token[token] for token in tokens], dtype=np.int64)

    @cached_property
    def _rows_by_token(self) -> dict[str, int]:
        return {str(token, "utf-8"): row for row, token in enumerate(self.sample_tokens)}

    def is_in_split(self, rows: NDArray[np.int64], split: str) -> NDArray[np.bool_]:
        """Which of the samples belong to a split; none to one that holds no scene here."""
        scenes = np.array([scene.encode() for scene in self.splits.scenes_of(split)], dtype=np.bytes_)
        inside = np.flatnonzero(np.isin(self.scene_names, scenes))
        return np.isin(self.sample_scenes[rows], inside)

    def _split_rows(self, split: str) -> NDArray[np.int64]:
        present = {str(name, "utf-8") for name in self.scene_names}
        self.splits.check(split, present, f"{self.version} in {self.root}")
        all_rows = np.arange(len(self))
        return all_rows[self.is_in_split(all_rows, split)]

    def dataset_info(self) -> dict[str, str]:
        """What a report says of the data set: the root's name, version, fingerprint, another LiDAR."""
        lidar = {} if self.lidar_channel == LIDAR_TOP else {"lidar_channel": self.lidar_channel}
        return {
            "root_name": self.root.resolve().name,
            "version": self.version,
            "fingerprint": self.fingerprint,
            **lidar,
        }


COLUMNS: tuple[str, ...] = tuple(LAYOUT.columns)
"""Files of an index."""


def open_index(
    root: str | Path,
    version: str = "v1.0-trainval",
    cache_dir: str | Path | None = None,
    task: DetectionTask = NUSCENES,
    lidar_channel: str = LIDAR_TOP,
) -> NuScenesIndex:
    """Opens the index of a data set, building it first where there is none for the present tables.

    Several processes may call this at once: each builds, the first to finish is kept.

    Args:
        root: the data root, the folder that holds `samples/`, `sweeps/` and the version's folder of tables.
        version: name of the folder of tables.
        cache_dir: where to keep the index. None means the root, or the user's cache if that is read-only.
        task: classes of the annotations.
        lidar_channel: name of the LiDAR in table `sensor`.

    Raises:
        UserError: the root, the version or a table is missing or damaged, there is no such LiDAR, or no place
            for the index can be written.
    """
    root = Path(root).expanduser()
    tables = find_tables(root, version)
    key = _key(tables, task, lidar_channel)
    seen = f"seen-{_hash([table.identity for table in tables])}"
    places, num_bytes = derived.homes(root, version, cache_dir), sum(table.num_bytes for table in tables)
    reasons, stuck = [], []
    for folder in derived.find(places, key):
        try:
            index = _load(folder, root, version, task, lidar_channel)
        except UserError as error:
            reasons.append(str(error))
        else:
            if _is_of(index, seen, num_bytes):
                return index
            reasons.append("its tables are others, of the same sizes and times")
        if not derived.discard(folder):
            stuck.append(folder.parent)
    if reasons:
        say(f"the index of {version} is built anew: {'; '.join(reasons)}")
    places = [home for home in places if home not in stuck] or places
    with derived.new_folder(places, key) as unfinished:
        folder = unfinished.with_name(key)
        _build(unfinished, root, version, num_bytes, task, lidar_channel)
        (unfinished / seen).touch()
        derived.publish(unfinished, folder)
    derived.drop_others(folder)
    return _load(folder, root, version, task, lidar_channel)


def _key(tables: list[Table], task: DetectionTask, lidar_channel: str) -> str:
    """Name of the folder of an index; of other classes, or another LiDAR, it is of a kind of its own."""
    source = [_SCHEMA, [table.size_and_time for table in tables]]
    if task == NUSCENES and lidar_channel == LIDAR_TOP:
        return _hash(source)
    return f"own-{_hash([*source, task.to_dict(), lidar_channel])}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _is_of(index: NuScenesIndex, seen: str, num_bytes: int) -> bool:
    """Whether an index is of the tables of its root, which are hashed where it has not seen them yet.

    Args:
        index: the index.
        seen: name of the file in it that says that it is of these very tables.
        num_bytes: how large they are.
    """
    if (index.folder / seen).is_file():
        return True
    with _progress(num_bytes, f"Comparing tables of {index.version}") as advance:
        is_same = fingerprint(index.root / index.version, advance) == index.fingerprint
    with suppress(OSError):  # where it cannot be written, the next one compares again
        if is_same:
            (index.folder / seen).touch(exist_ok=False)
    return is_same


def _build(
    folder: Path, root: Path, version: str, num_bytes: int, task: DetectionTask, lidar_channel: str
) -> None:
    from cpq_train.data.index_builder import read_columns

    with _progress(num_bytes, f"Indexing {version}") as advance:
        reader = TableReader(root / version, advance)
        columns = read_columns(reader, task, lidar_channel)
    assert set(columns) == set(COLUMNS)
    splits = official_splits(str(name, "utf-8") for name in columns["scene_names"])
    num_bytes = sum(column.nbytes for column in columns.values())
    with naming_full_disks(f"the index of {version}", folder.parent, num_bytes, folder):
        write_columns(folder, columns, {"fingerprint": reader.fingerprint, "splits": splits})


@contextmanager
def _progress(num_bytes: int, title: str) -> Iterator[Callable[[int], None]]:
    """How far the bytes are read, where there are enough of them to wait for."""
    if num_bytes < _PROGRESS_FROM_BYTES:
        yield lambda _: None
        return
    with progress(f"{title} (MB)", num_bytes / 1e6) as advance:
        yield lambda count: advance(count / 1e6)


def _load(folder: Path, root: Path, version: str, task: DetectionTask, lidar_channel: str) -> NuScenesIndex:
    """Maps an index.

    Raises:
        UserError: it is damaged, or a column is missing.
    """
    meta, columns = open_columns(folder, LAYOUT, {"K": len(task.names), "T": len(task.attributes)})
    index = object.__new__(NuScenesIndex)
    validated(_META, meta, str(folder))
    splits = Splits(meta["splits"], version, root / version / SPLITS_FILE)
    index.__dict__.update(folder=folder, root=root, version=version, task=task, lidar_channel=lidar_channel)
    index.__dict__.update(fingerprint=meta["fingerprint"], splits=splits, _unchecked=columns)
    return index
