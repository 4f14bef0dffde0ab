"""What the index of a data set of nuScenes' size costs to build, to open, and to each further process.

    python scripts/bench/index.py

Writes tables of the size and layout of v1.0-trainval (850 scenes, 34,149 samples, 2.6 million sensor frames,
1.17 million annotations; about 2.4 GB in a temporary folder, no clouds), builds their index in a process of
its own, opens it in another, and lets several processes, forked and spawned, read at the same time all that a
loader's worker reads of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from jsonargparse import auto_cli
from results import write_rows

from cpq_train.common.nuscenes import CATEGORY_TO_CLASS
from cpq_train.data.dataset import target_boxes
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.sweeps import previous_frames, sweep_transform, time_lag_s

VERSION = "v1.0-trainval"
NUM_SCENES, NUM_SAMPLES, NUM_INSTANCES, NUM_ANNOTATIONS = 850, 34_149, 64_386, 1_166_187
FRAMES_PER_SAMPLE = (
    {"LIDAR_TOP": 10.0} | {f"CAM_{i}": 6.0 for i in range(6)} | {f"RADAR_{i}": 6.6 for i in range(5)}
)
SAMPLE_PERIOD_US = 500_000
MIB = 1 << 20


@dataclass
class Cost:
    """What was measured; one thread, times in seconds of CPU, memory in MiB.

    Attributes:
        tables: bytes of all tables.
        build: time of the build.
        build_peak: peak resident memory of the building process.
        build_start: resident memory of that process before, interpreter and libraries.
        index: bytes of the index.
        open_wall: wall time to open it, in a process that has imported everything.
        private: how much each of several forked (spawned) processes grew in memory of its own by reading it.
        share: the same with its share of the mapped files (PSS).
    """

    tables: float
    build: float
    build_peak: float
    build_start: float
    index: float
    open_wall: float
    private: dict[str, float]
    share: dict[str, float]


def main(folder: Path | None = None, fraction: float = 1.0, num_processes: int = 4) -> None:
    """Measures and prints.

    Args:
        folder: where to put the temporary folder; null for the system's.
        fraction: of the scenes, to try it.
        num_processes: that read the index at the same time.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        write_tables(root / VERSION, round(fraction * NUM_SCENES))
        build, peak, start = _in_process(_build, root)
        open_wall, index_bytes = _in_process(_open, root)
        growths = {method: _growths(root, method, num_processes) for method in ("fork", "spawn")}
        cost = Cost(
            tables=sum(path.stat().st_size for path in (root / VERSION).iterdir()) / MIB,
            build=build,
            build_peak=peak,
            build_start=start,
            index=index_bytes / MIB,
            open_wall=open_wall,
            private={method: mean(private for private, _ in each) for method, each in growths.items()},
            share={method: mean(share for _, share in each) for method, each in growths.items()},
        )
    values = {name: value for name, value in asdict(cost).items() if not isinstance(value, dict)}
    for name in ("private", "share"):
        values |= {f"{name}, {method}": value for method, value in getattr(cost, name).items()}
    write_rows("index", [{"what": name, "value": value} for name, value in values.items()], fraction=fraction)


def _build(root: Path) -> tuple[float, float, float]:
    start_mib = _peak_mib()
    start_s = time.process_time()
    open_index(root, VERSION)
    return time.process_time() - start_s, _peak_mib(), start_mib


def _open(root: Path) -> tuple[float, int]:
    start_s = time.perf_counter()
    index = open_index(root, VERSION)
    return time.perf_counter() - start_s, sum(path.stat().st_size for path in index.folder.iterdir())


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_process(function: Callable[[Path], Any], root: Path) -> Any:
    """Runs in a process of its own, which has imported what this one has and nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (root,))


def _growths(root: Path, method: str, number: int) -> list[tuple[float, float]]:
    """Growth of private memory and of PSS, MiB, of processes that hold the whole index at once."""
    context: Any = multiprocessing.get_context(method)
    index = open_index(root, VERSION)
    barrier = context.Barrier(number)
    pipes = [context.Pipe() for _ in range(number)]
    processes = [context.Process(target=_read_all, args=(index, barrier, sender)) for _, sender in pipes]
    for process in processes:
        process.start()
    growths = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return growths


def _read_all(index: NuScenesIndex, barrier: Any, sender: Connection) -> None:
    """Reads what a worker does for a share of all samples, in a random order, and maps the rest too."""
    barrier.wait()  # until all exist: a fork lowers the share of the others
    before = _memory_mib()
    barrier.wait()
    for row in np.random.default_rng(0).permutation(len(index)):
        index.sample_token(row)
        target_boxes(index, row)
        for frame in set(previous_frames(index, row, 10)):
            index.frame_path(frame)
            if row % 10 == 0:  # the same pages, and ten times as slow as all else
                sweep_transform(index, row, frame), time_lag_s(index, row, frame)
    barrier.wait()
    after = _memory_mib()
    barrier.wait()
    sender.send(tuple(new - old for new, old in zip(after, before, strict=True)))


def _memory_mib() -> tuple[float, float]:
    """Private memory and proportional set size of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, kib["Pss"] / 1024


def write_tables(folder: Path, num_scenes: int) -> None:
    """Writes all tables that the index reads, as nuScenes lays them out: every key on a line of its own."""
    folder.mkdir(parents=True)
    categories = list(CATEGORY_TO_CLASS)
    counts = _split(round(NUM_SAMPLES * num_scenes / NUM_SCENES), num_scenes)
    sensors = list(FRAMES_PER_SAMPLE)
    tables: dict[str, Iterator[dict[str, Any]]] = {
        "category": ({"token": _token("category", i), "name": name} for i, name in enumerate(categories)),
        "attribute": iter([{"token": _token("attribute", 0), "name": "vehicle.moving"}]),
        "sensor": ({"token": _token("sensor", i), "channel": name} for i, name in enumerate(sensors)),
        "calibrated_sensor": _calibrations(num_scenes, len(sensors)),
        "scene": ({"token": _token("scene", i), "name": f"scene-{i:04d}"} for i in range(num_scenes)),
        "sample": _samples(counts),
        "sample_data": (frame for frame, _ in _frames(counts)),
        "ego_pose": (pose for _, pose in _frames(counts)),
        "instance": (instance for instance, _ in _instances(counts, len(categories))),
        "sample_annotation": (a for _, several in _instances(counts, len(categories)) for a in several),
    }
    for name, records in tables.items():
        with (folder / f"{name}.json").open("w") as file:
            file.write("[\n")
            for i, record in enumerate(records):
                file.write((",\n" if i else "") + json.dumps(record).replace(', "', ',\n"'))
            file.write("\n]")


def _split(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _token(table: str, *number: int) -> str:
    return hashlib.md5(f"{table}{number}".encode()).hexdigest()


def _link(table: str, at: tuple[int, ...], row: int, end: int) -> dict[str, str]:
    return {
        "prev": _token(table, *at, row - 1) if row else "",
        "next": _token(table, *at, row + 1) if row + 1 < end else "",
    }


def _pose(number: float) -> dict[str, list[float]]:
    half = math.sin(number) / 2
    return {
        "rotation": [math.cos(half), 0.0012345678901234, -0.0098765432109876, math.sin(half)],
        "translation": [1000 + 600 * math.sin(number), 1500 + 600 * math.cos(number), 0.0],
    }


def _calibrations(num_scenes: int, num_sensors: int) -> Iterator[dict[str, Any]]:
    for scene in range(num_scenes):
        for sensor in range(num_sensors):
            tokens = {"token": _token("calibrated", scene, sensor), "sensor_token": _token("sensor", sensor)}
            yield tokens | _pose(scene) | {"camera_intrinsic": []}


def _samples(counts: list[int]) -> Iterator[dict[str, Any]]:
    for scene, count in enumerate(counts):
        for row in range(count):
            yield {
                "token": _token("sample", scene, row),
                "timestamp": _time_us(scene, row),
                **_link("sample", (scene,), row, count),
                "scene_token": _token("scene", scene),
            }


def _time_us(scene: int, samples: float) -> int:
    return 1_531_000_000_000_000 + scene * 100_000_000 + int(samples * SAMPLE_PERIOD_US)


def _frames(counts: list[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of sample_data and ego_pose, which have one token, as in nuScenes."""
    for scene, count in enumerate(counts):
        for sensor, (channel, per_sample) in enumerate(FRAMES_PER_SAMPLE.items()):
            key_frames = {round(row * per_sample): row for row in range(count)}
            last = round((count - 1) * per_sample)
            for frame in range(last + 1):
                yield _frame(scene, sensor, channel, frame, last, math.ceil(frame / per_sample), key_frames)


def _frame(
    scene: int, sensor: int, channel: str, frame: int, last: int, sample: int, key_frames: dict[int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    token = _token("frame", scene, sensor, frame)
    time_us = _time_us(scene, frame / FRAMES_PER_SAMPLE[channel]) + sensor * 1000
    folder = "samples" if frame in key_frames else "sweeps"
    sample_data = {
        "token": token,
        "sample_token": _token("sample", scene, key_frames.get(frame, sample)),
        "ego_pose_token": token,
        "calibrated_sensor_token": _token("calibrated", scene, sensor),
        "timestamp": time_us,
        "fileformat": "pcd",
        "is_key_frame": frame in key_frames,
        "height": 0,
        "width": 0,
        "filename": f"{folder}/{channel}/n015-2018-07-18-11-07-57+0800__{channel}__{time_us}.pcd.bin",
        **_link("frame", (scene, sensor), frame, last + 1),
    }
    return sample_data, {"token": token, "timestamp": time_us, **_pose(scene + frame / 100)}


def _instances(
    counts: list[int], num_categories: int
) -> Iterator[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """Records of instance, each with its records of sample_annotation: one in each of a run of samples."""
    num_instances = _split(NUM_INSTANCES * len(counts) // NUM_SCENES, len(counts))
    rng = np.random.default_rng(0)
    for scene, (count, number) in enumerate(zip(counts, num_instances, strict=True)):
        per_scene = NUM_ANNOTATIONS * count // NUM_SAMPLES
        for row, length in enumerate(_split(per_scene, number)):
            first = int(rng.integers(0, count - length + 1))
            instance = {
                "token": _token("instance", scene, row),
                "category_token": _token("category", row % num_categories),
                "nbr_annotations": length,
                "first_annotation_token": _token("annotation", scene, row, 0),
                "last_annotation_token": _token("annotation", scene, row, length - 1),
            }
            yield instance, _annotations(scene, row, first, length)


def _annotations(scene: int, instance: int, first: int, length: int) -> Iterator[dict[str, Any]]:
    for i in range(length):
        yield {
            "token": _token("annotation", scene, instance, i),
            "sample_token": _token("sample", scene, first + i),
            "instance_token": _token("instance", scene, instance),
            "visibility_token": "4",
            "attribute_tokens": [_token("attribute", 0)],
            **_pose(scene + i / 100 + instance),
            "size": [1.875, 4.512, 1.623],
            **_link("annotation", (scene, instance), i, length),
            "num_lidar_pts": 5 + i,
            "num_radar_pts": 1,
        }


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
