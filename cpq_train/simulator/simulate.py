"""Writing a whole data set: which scenes, by which workers, and never half of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import stat
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from cpq_train.common.child_processes import follow_parent
from cpq_train.common.documents import read_json
from cpq_train.common.errors import UserError
from cpq_train.common.files import check_writable
from cpq_train.common.folders import LOCK_FILE, FolderInUse, is_lock, locked, naming_full_disks
from cpq_train.common.progress import track
from cpq_train.common.signals import signals_blocked
from cpq_train.simulator.scene import CLOUD_BYTES, SceneTask, num_sweeps, simulate_scene
from cpq_train.simulator.tables import CHANNEL, SCENE_TABLES, Tables, shared_tables

MINI, TRAINVAL = "v1.0-mini", "v1.0-trainval"
MANIFEST = "simulation.json"
WORLD_REVISION = 4
"""Raised whenever the same seed makes other clouds or tables than before."""


def simulate(
    output: Path,
    num_scenes: int = 10,
    num_val_scenes: int | None = None,
    num_samples_per_scene: int = 4,
    version: Literal["v1.0-mini", "v1.0-trainval"] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Writes a data set of simulated LiDAR in the nuScenes format, which nuscenes-devkit opens unmodified.

    The root appears under its name only when it is whole. A whole one made by the same arguments is left as
    it is. Files are the same for any number of workers. Workers import the caller's main module, so a
    script calls this under `if __name__ == "__main__":`.

    Args:
        output: Data root to make.
        num_scenes: Number of scenes, training and validation together.
        num_val_scenes: How many of them carry the names of official validation scenes; a fifth by default.
        num_samples_per_scene: Key frames per scene, half a second apart (real scenes have 40).
        version: Version folder: v1.0-mini has up to 8 training and 2 validation scenes, v1.0-trainval up to
            700 and 150. By default the smaller one that holds the scenes.
        seed: Another seed is another data set.
        num_workers: Processes; by default one per core.

    Raises:
        UserError: Numbers out of range, something else lies at `output` or is being made there, or the disk
            is full.
    """
    num_val = _num_val(num_scenes, num_val_scenes)
    if version not in (None, MINI, TRAINVAL):
        raise UserError(f"version is {version}; accepted: {MINI}, {TRAINVAL}")
    folder: str = version or (MINI if num_scenes - num_val <= 8 and num_val <= 2 else TRAINVAL)
    if num_samples_per_scene < 1:
        raise UserError(f"num_samples_per_scene is {num_samples_per_scene}; it must be at least 1")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; it must be at least 1")
    scenes = _scene_names(folder, num_scenes - num_val, num_val)
    manifest = {
        "world_revision": WORLD_REVISION,
        "version": folder,
        "scenes": scenes,
        "num_samples_per_scene": num_samples_per_scene,
        "seed": seed,
    }
    output = Path(output).absolute()
    if _is_there(output, manifest):
        return
    check_writable(output.parent, "output")
    num_clouds = len(scenes) * num_sweeps(num_samples_per_scene)
    with naming_full_disks("the data set", output, num_clouds * CLOUD_BYTES), _partial(output) as partial:
        if not _is_there(output, manifest):  # another process may have finished it just now
            _write(partial, manifest, num_workers or _num_cores())
            _publish(partial, output)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _num_val(num_scenes: int, num_val_scenes: int | None) -> int:
    if num_scenes < 1:
        raise UserError(f"num_scenes is {num_scenes}; it must be at least 1")
    if num_val_scenes is None:
        return min(150, num_scenes // 2 if num_scenes < 4 else round(num_scenes / 5))
    if not 0 <= num_val_scenes <= num_scenes:
        raise UserError(
            f"num_val_scenes is {num_val_scenes}; it must lie between 0 and num_scenes, {num_scenes}"
        )
    return num_val_scenes


def _scene_names(version: str, num_train: int, num_val: int) -> list[str]:
    """The first names of the official training and validation splits."""
    from nuscenes.utils import splits  # takes seconds to import

    names: list[str] = []
    pools = (splits.mini_train, splits.mini_val) if version == MINI else (splits.train, splits.val)
    for what, number, pool in zip(("training", "validation"), (num_train, num_val), pools, strict=True):
        if number > len(pool):
            raise UserError(f"{number} {what} scenes asked for; {version} has names for at most {len(pool)}")
        names += pool[:number]
    return names


def _is_there(output: Path, manifest: dict[str, Any]) -> bool:
    """Whether the asked data set lies at `output` already.

    Raises:
        UserError: Something else does.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    found = output / MANIFEST
    if found.is_file() and read_json(found, "manifest") == manifest:
        return True
    raise UserError(
        f"output {output} exists and is not the data set asked for; give a new or an empty directory"
    )


@contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """An empty directory beside `output` that is this process's own, gone when the block ends.

    What a simulation into the same place has left that was killed is removed first.

    Raises:
        UserError: Another simulation writes there, or something else has that name.
    """
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.mkdir(parents=True)
        is_there = False
    except FileExistsError:
        is_there = True
        _check_ours(partial, output)
    try:
        with locked(partial) as has_locks:
            if is_there and not has_locks:
                raise FolderInUse(f"{str(partial)!r} may be left of one that was killed: then remove it")
            for path in set(partial.iterdir()) - {partial / LOCK_FILE}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except FolderInUse as error:
        raise UserError(
            f"output {output} is being made by another simulation: {error}; accepted: another place, or this "
            "one when that has ended"
        ) from error


def _check_ours(partial: Path, output: Path) -> None:
    """See that a folder is a simulation's of this user, before it is emptied.

    Raises:
        UserError: Somebody else has put it there, or the user has put something else there.
    """
    status, lock = partial.lstat(), partial / LOCK_FILE
    if not stat.S_ISDIR(status.st_mode):
        what = "is a link or a file"
    elif status.st_uid != os.getuid():
        what = "belongs to another user"
    elif any(partial.iterdir()) and not is_lock(lock):
        what = "holds no lock of a simulation"
    else:
        return
    raise UserError(
        f"output {output} would be made in {str(partial)!r}, which is there and {what}; accepted: another "
        "place, or this one when that is moved away"
    )


def _publish(partial: Path, output: Path) -> None:
    (partial / LOCK_FILE).unlink()
    partial.chmod(0o755)
    os.replace(partial, output)


def _write(root: Path, manifest: dict[str, Any], num_workers: int) -> None:
    for folder in (f"samples/{CHANNEL}", f"sweeps/{CHANNEL}", "maps", manifest["version"]):
        (root / folder).mkdir(parents=True)
    tasks = [
        SceneTask(root, name, manifest["seed"], manifest["num_samples_per_scene"])
        for name in manifest["scenes"]
    ]
    tables: Tables = {name: [] for name in SCENE_TABLES}
    for rows in track(_run(tasks, num_workers), "Simulating scenes", len(tasks)):
        for name in SCENE_TABLES:
            tables[name] += rows[name]
    tables.update(shared_tables(tables["log"]))
    for name, table in tables.items():
        (root / manifest["version"] / f"{name}.json").write_text(json.dumps(table, indent=0))
    for place in tables["map"]:
        (root / place["filename"]).write_bytes(_blank_png(64, 64))
    (root / MANIFEST).write_text(json.dumps(manifest))


def _run(tasks: list[SceneTask], num_workers: int) -> Iterator[Tables]:
    """Rows of each scene, in order."""
    if min(num_workers, len(tasks)) == 1:
        yield from map(simulate_scene, tasks)
        return
    # Spawned: a fork would copy whatever threads and locks the caller has.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(tasks)), context, follow_parent) as pool:
        with signals_blocked():
            scenes = [pool.submit(simulate_scene, task) for task in tasks]
        try:
            for scene in scenes:
                yield scene.result()
        except BaseException:  # the pool would wait for the scenes that it has begun
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _blank_png(width: int, height: int) -> bytes:
    """A grey-scale image of one shade: maps are not simulated, but the devkit wants a mask per log."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 + width) * height)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
