"""The torchmetrics class: one process, and two with uneven and duplicated samples."""

import dataclasses
import socket
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DistributedSampler

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.index import COLUMNS, NuScenesIndex
from cpq_train.data.samplers import EvaluationSampler
from cpq_train.evaluation.lightning_metric import NuScenesDetectionMetric

Rows = NDArray[np.int64]


class Detections(NamedTuple):
    boxes: Tensor
    scores: Tensor
    labels: Tensor


def noisy_annotations(index: NuScenesIndex, row: int) -> Detections:
    """The annotations of a sample, displaced, with random scores that depend on the sample only."""
    generator = np.random.default_rng(row)
    within = index.annotations(row)
    labels = index.annotation_classes[within].astype(np.int64)
    boxes = np.nan_to_num(index.annotation_boxes[within][labels >= 0])
    boxes[:, :2] += generator.normal(0, 0.7, (len(boxes), 2))
    scores = generator.random(len(boxes)).round(1)
    return Detections(*(torch.from_numpy(x) for x in (boxes.astype(np.float32), scores, labels[labels >= 0])))


def update(metric: NuScenesDetectionMetric, index: NuScenesIndex, rows: Rows) -> None:
    for start in range(0, len(rows), 2):
        batch = rows[start : start + 2]
        metric.update(torch.from_numpy(batch), [noisy_annotations(index, int(row)) for row in batch])


@pytest.fixture(scope="module")
def rows(mini_index: NuScenesIndex) -> Rows:
    return mini_index.sample_rows("val")[:13]


@pytest.fixture(scope="module")
def expected(mini_index: NuScenesIndex, rows: Rows) -> tuple[float, float]:
    metric = NuScenesDetectionMetric(mini_index, rows)
    update(metric, mini_index, rows)
    scores = metric.compute().scores
    return scores.mean_ap, scores.nds


def test_any_order_and_duplicates_give_the_same(
    mini_index: NuScenesIndex, rows: Rows, expected: tuple[float, float]
) -> None:
    metric = NuScenesDetectionMetric(mini_index, rows)
    update(metric, mini_index, np.concatenate([rows[::-1], rows[:5]]))
    scores = metric.compute().scores
    assert (scores.mean_ap, scores.nds) == expected
    assert 0.1 < scores.mean_ap < 0.9


def test_labels_index_the_class_names_of_the_detector(mini_index: NuScenesIndex, rows: Rows) -> None:
    usual = NuScenesDetectionMetric(mini_index, rows)
    permuted = NuScenesDetectionMetric(mini_index, rows, DETECTION_CLASSES[::-1])
    for row in rows:
        found = noisy_annotations(mini_index, int(row))
        usual.update([row], [found])
        permuted.update([row], [found._replace(labels=9 - found.labels)])
    one, two = usual.compute(), permuted.compute()
    np.testing.assert_array_equal(one.scores.ap, two.scores.ap)
    np.testing.assert_array_equal(one.scores.errors, two.scores.errors)
    np.testing.assert_array_equal(one.predictions.boxes.label, two.predictions.boxes.label)
    np.testing.assert_array_equal(one.predictions.boxes.attribute, two.predictions.boxes.attribute)
    row = int(rows[0])
    np.testing.assert_array_equal(usual.detections_of(row).labels, permuted.detections_of(row).labels)
    with pytest.raises(UserError, match="class_names names 'tram'"):
        NuScenesDetectionMetric(mini_index, rows, ["tram"])


def test_reset_forgets(mini_index: NuScenesIndex, rows: Rows) -> None:
    metric = NuScenesDetectionMetric(mini_index, rows)
    update(metric, mini_index, rows)
    metric.reset()
    update(metric, mini_index, rows[:3])
    with pytest.raises(UserError, match="10 missing"):
        metric.compute()


def test_a_sample_that_is_not_scored(mini_index: NuScenesIndex, rows: Rows) -> None:
    metric = NuScenesDetectionMetric(mini_index, rows[:3])
    with pytest.raises(UserError, match="accepted: the 3 rows"):
        update(metric, mini_index, rows[3:4])


def _rank(rank: int, port: int, index: NuScenesIndex, rows: Rows, output: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=20), world_size=2, rank=rank)
    metric = NuScenesDetectionMetric(index, rows)
    mine = [np.concatenate([rows[:9], rows[:1]]), np.concatenate([rows[9:], rows[2:3]])][rank]
    results = []
    for _ in range(2):
        update(metric, index, mine)
        scores = metric.compute().scores
        results.append([scores.mean_ap, scores.nds])
        metric.reset()
    np.save(output / f"{rank}.npy", results)
    dist.destroy_process_group()


def test_two_ranks_with_uneven_and_duplicated_samples(
    mini_index: NuScenesIndex, rows: Rows, expected: tuple[float, float], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, (port, mini_index, rows, tmp_path), nprocs=2, start_method="fork")
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), [expected, expected])


NUM_VAL = 6019
"""Samples of nuScenes' validation split, which 8 does not divide."""


def val_sized(index: NuScenesIndex) -> NuScenesIndex:
    """As many samples as the validation split has: those of the mini one over and over, two objects each."""
    origin = np.arange(NUM_VAL) % len(index)
    kept = np.minimum(np.diff(index.annotation_offsets)[origin], 2)
    ends = np.cumsum(kept)
    annotations = np.repeat(index.annotation_offsets[origin], kept)
    annotations += np.arange(ends[-1]) - np.repeat(ends - kept, kept)
    of_samples = {name: getattr(index, name)[origin] for name in COLUMNS if name.startswith("sample_")}
    of_samples["sample_tokens"] = np.array([b"%032d" % row for row in range(NUM_VAL)])
    names = [name for name in COLUMNS if name.startswith("annotation_") and name != "annotation_offsets"]
    of_annotations = {name: getattr(index, name)[annotations] for name in names}
    offsets = np.concatenate([[0], ends])
    return dataclasses.replace(index, **of_samples, **of_annotations, annotation_offsets=offsets)


def _eighth(rank: int, port: int, index: NuScenesIndex, output: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=60), world_size=8, rank=rank)
    every = np.arange(NUM_VAL)
    metric = NuScenesDetectionMetric(index, every)
    results = []
    for sampler in (EvaluationSampler(every, rank, 8), DistributedSampler(every, 8, rank, shuffle=False)):
        update(metric, index, np.array(list(sampler)))
        of_sampler = [len(list(sampler))]
        if rank == 0:
            scored = metric.compute()
            of_sampler += [len(scored.predictions.score), scored.scores.mean_ap, scored.scores.nds]
        else:  # takes part in the exchange, which is all that this rank's own evaluation would add
            metric.sync()
            assert len(metric._gathered) == NUM_VAL
            metric.unsync()
        results.append(of_sampler)
        metric.reset()
    np.save(output / f"{rank}.npy", results)
    dist.destroy_process_group()


def test_uneven_tail_of_8_ranks_is_scored_once(mini_index: NuScenesIndex, tmp_path: Path) -> None:
    """Whether the ranks hold 6019 samples, or 6024 of a sampler that pads."""
    index = val_sized(mini_index)
    alone = NuScenesDetectionMetric(index, np.arange(NUM_VAL))
    update(alone, index, np.arange(NUM_VAL))
    scored = alone.compute()
    expected = [len(scored.predictions.score), scored.scores.mean_ap, scored.scores.nds]
    assert 0.01 < scored.scores.mean_ap < 0.9
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_eighth, (port, index, tmp_path), nprocs=8, start_method="fork")
    of_ranks = [np.load(tmp_path / f"{rank}.npy") for rank in range(8)]
    assert [int(of_rank[0, 0]) for of_rank in of_ranks] == [753] * 3 + [752] * 5
    assert sum(of_rank[:, 0] for of_rank in of_ranks).tolist() == [6019, 6024]
    np.testing.assert_array_equal(of_ranks[0][:, 1:], [expected, expected])
