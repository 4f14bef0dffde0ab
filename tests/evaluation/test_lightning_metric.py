"""The torchmetrics class: one process, and two with uneven and duplicated samples."""

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

from cpq_train.data.index import NuScenesIndex
from cpq_train.errors import UserError
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
