"""What loading a sample of ten sweeps costs, stage by stage, beside other projects' loaders.

    python scripts/bench/loader.py --openpcdet CHECKOUT

Clouds are simulated at the sensor's density (32 beams, about 1085 firings a turn) or taken from `--root`. All
arms load the same samples in turn within each round; CPU time of one thread, medians over the rounds. Files
are in the page cache: what storage costs is not measured. Then batches come through DataLoaders in wall time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from jsonargparse import auto_cli
from machine import settle
from peer_loaders import devkit_loader, openpcdet_dataset, spconv_voxelizer
from results import Row, write_rows

from cpq_train.data.augmentation import Augmentation
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import DetectionDataset, SampleConfig, collate, target_boxes
from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.data.sweeps import load_cloud, load_sweeps, previous_frames
from cpq_train.data.voxelization import Voxelizer
from cpq_train.simulator import simulate

SAMPLES = {
    "0.1 m": SampleConfig(10, (0.1, 0.1, 0.2), (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0), 10, 60000),
    "0.075 m": SampleConfig(10, (0.075, 0.075, 0.2), (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0), 10, 120000),
}
BATCH_SIZE = 4
Times = dict[str, list[float]]


def main(
    root: Path | None = None,
    version: str = "v1.0-mini",
    openpcdet: Path | None = None,
    num_rounds: int = 15,
    num_workers: list[int] = [0, 1, 2],  # noqa: B006 - only read
    step_s: float = 0.5,
) -> None:
    """Measures and prints.

    Args:
        root: a data root; null simulates two scenes in a temporary folder.
        version: its folder of tables.
        openpcdet: OpenPCDet's repository; null leaves it out.
        num_rounds: how often each sample is loaded by each arm.
        num_workers: of the data loaders that are measured.
        step_s: how long a training step of a batch of 4 keeps the main process, for the time that it waits.
    """
    settle()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if root is None:
            root = Path(folder) / "simulated"
            simulate(root, num_scenes=2, num_val_scenes=1)
        index = open_index(root, version)
        samples = [row for row in range(len(index)) if len(set(previous_frames(index, row, 10))) == 9]
        for name, sample in SAMPLES.items():
            training = replace(sample, augmentation=Augmentation(), is_training=True)
            arms = _arms(index, samples, training, openpcdet, Path(folder))
            found[name] = _measure(arms, samples, num_rounds)
        for number in num_workers:
            found[f"{number} workers"] = _through_loader(root, version, number, step_s)
    rows: list[Row] = [
        {"on": on, "what": what, "value": v} for on, values in found.items() for what, v in values.items()
    ]
    write_rows("loader", rows, rounds=num_rounds)


def _measure(arms: list[Callable[[int, Times], None]], rows: list[int], num_rounds: int) -> dict[str, float]:
    """Median milliseconds of each stage."""
    times: Times = defaultdict(list)
    for arm in arms:
        arm(rows[0], defaultdict(list))
    for turn in range(num_rounds):
        for row in rows:
            for i in range(len(arms)):
                arms[(i + turn) % len(arms)](row, times)
    return {name: 1000 * median(each) for name, each in times.items()}


@contextmanager
def _timed(times: Times, name: str, parts: int = 1) -> Iterator[None]:
    start_s = time.thread_time()
    yield
    times[name].append((time.thread_time() - start_s) / parts)


def _arms(
    index: NuScenesIndex, rows: list[int], sample: SampleConfig, openpcdet: Path | None, folder: Path
) -> list[Callable[[int, Times], None]]:
    dataset = DetectionDataset(index, np.array(rows), sample)
    positions = {row: position for position, row in enumerate(rows)}
    devkit, spconv = devkit_loader(index, sample.num_sweeps), spconv_voxelizer(sample)

    def ours(row: int, times: Times) -> None:
        with _timed(times, "ours"):
            item = dataset[positions[row]]
        with _timed(times, "ours: collate", BATCH_SIZE):
            collate([item] * BATCH_SIZE)

    def load_with_devkit(row: int, times: Times) -> None:
        with _timed(times, "devkit: read and compensate"):
            devkit(row)

    def voxelize_with_spconv(row: int, times: Times) -> None:
        points = np.ascontiguousarray(load_sweeps(index, row))
        order = np.random.default_rng(row).permutation(len(points))
        with _timed(times, "spconv: shuffle and voxelize"):
            spconv(points[order])

    arms = [ours, _stages(index, sample), load_with_devkit, voxelize_with_spconv]
    if openpcdet is not None:
        theirs = openpcdet_dataset(openpcdet, index, rows, sample, folder)

        def load_with_openpcdet(row: int, times: Times) -> None:
            with _timed(times, "OpenPCDet"):
                item = theirs[positions[row]]
            with _timed(times, "OpenPCDet: collate", BATCH_SIZE):
                theirs.collate_batch([item] * BATCH_SIZE)

        arms.append(load_with_openpcdet)
    return arms


def _stages(index: NuScenesIndex, sample: SampleConfig) -> Callable[[int, Times], None]:
    voxelize = Voxelizer(
        sample.voxel_size, sample.point_cloud_range, sample.max_points_per_voxel, sample.max_num_voxels
    )

    def run(row: int, times: Times) -> None:
        rng = np.random.default_rng(row)
        with _timed(times, "ours: read alone"):
            for frame in [int(index.sample_frames[row]), *previous_frames(index, row, sample.num_sweeps)]:
                load_cloud(index, frame, row)
        with _timed(times, "ours: read and compensate"):
            points = load_sweeps(index, row, sample.num_sweeps)
        with _timed(times, "ours: augment"):
            boxes = target_boxes(index, row)
            assert sample.augmentation is not None
            sample.augmentation.apply(points, boxes[:, :9], rng)
        with _timed(times, "ours: draw the order"):
            order = rng.permutation(len(points))
        with _timed(times, "ours: shuffle and voxelize"):
            voxelize(points, order)

    return run


def _through_loader(root: Path, version: str, num_workers: int, step_s: float) -> dict[str, float]:
    """Batches through the data module's own loader: throughput, and how long steps wait for a batch."""
    data = NuScenesDataModule(str(root), version, batch_size=BATCH_SIZE, num_workers=num_workers)
    sample = replace(SAMPLES["0.1 m"], augmentation=Augmentation(), is_training=True)
    rows = np.resize(np.arange(len(data.index)), 40 * BATCH_SIZE)  # an epoch longer than what is measured
    loader = iter(data._loader(DetectionDataset(data.index, rows, sample), batch_size=BATCH_SIZE))
    next(loader)
    start_s, start_cpu_s, number = time.perf_counter(), time.thread_time(), 12
    for _ in range(number):
        next(loader)
    wall_s, cpu_s = time.perf_counter() - start_s, time.thread_time() - start_cpu_s
    waits = []
    for _ in range(number):
        time.sleep(step_s)
        start_s = time.perf_counter()
        next(loader)
        waits.append(time.perf_counter() - start_s)
    return {
        "samples per second": number * BATCH_SIZE / wall_s,
        "main thread, CPU ms per sample": 1000 * cpu_s / number / BATCH_SIZE,
        "wait per step, ms": 1000 * median(waits),
    }


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=False))
