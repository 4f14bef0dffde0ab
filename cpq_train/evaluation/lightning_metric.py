"""The nuScenes metric as a torchmetrics `Metric`: collects detections on every rank, scores them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from cpq_train.common.detection_task import NUSCENES, DetectionTask
from cpq_train.common.errors import UserError
from cpq_train.data.index import NuScenesIndex
from cpq_train.evaluation.boxes import Ints
from cpq_train.evaluation.countable import check_countable
from cpq_train.evaluation.ground_truth import ground_truth
from cpq_train.evaluation.metric import evaluate
from cpq_train.evaluation.predictions import LidarDetections, best_detections, predictions_from_detections
from cpq_train.evaluation.run_files import ScoredSplit


class DetectionsOfSample(Protocol):
    """What a detector says of one sample: tensors on any device, boxes (N, 9) in the LiDAR frame."""

    @property
    def boxes(self) -> Tensor: ...  # noqa: D102

    @property
    def scores(self) -> Tensor: ...  # noqa: D102

    @property
    def labels(self) -> Tensor: ...  # noqa: D102


class DetectionCollector(Metric):
    """The detections of all ranks.

    Detections are kept by sample row: a sample that a padded sampler gives twice counts once, and ranks
    may hold different numbers of samples. `compute` gives them on every rank.

    Args:
        rows: (S,) rows of the samples that are detected in, each once.
        class_names: what the labels of the detector index; those of `LidarDetections` are ids of the task.
        task: classes and rules.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        UserError: A row occurs twice.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    num_updates: Tensor

    def __init__(
        self,
        rows: Ints,
        class_names: Sequence[str] = NUSCENES.names,
        task: DetectionTask = NUSCENES,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._rows = np.asarray(rows, np.int64)
        self._class_ids = task.ids(class_names)
        self._known = frozenset(self._rows.tolist())
        if len(self._known) < len(self._rows):
            raise UserError(
                f"{len(self._rows)} samples, {len(self._known)} different ones; accepted: each once"
            )
        self._detections: dict[int, LidarDetections] = {}
        self._gathered: dict[int, LidarDetections] = {}
        # A tensor state makes Metric synchronise at all; the detections travel with it in `_sync_dist`.
        self.add_state("num_updates", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, sample_rows: Tensor | Sequence[int], detections: Sequence[DetectionsOfSample]) -> None:
        """Add the detections of some samples; of a sample seen before, the first are kept.

        Args:
            sample_rows: (B,) rows of the samples.
            detections: those of each sample.

        Raises:
            UserError: A sample is not one of those that are detected in.
        """
        rows: list[int] = torch.as_tensor(sample_rows).tolist()  # a GPU is waited for once
        if unknown := [row for row in rows if row not in self._known]:
            raise UserError(
                f"detections for sample row {unknown[0]}; accepted: the {len(self._rows)} rows to score"
            )
        for row, found in zip(rows, _on_host(detections, self._class_ids), strict=True):
            self._detections.setdefault(row, found)
        self.num_updates += 1

    def compute(self) -> Any:
        """Sample row -> detections, of all ranks."""
        return self._of_all_ranks()

    def _of_all_ranks(self) -> dict[int, LidarDetections]:
        return self._gathered if self._is_synced else self._detections

    def detections_of(self, row: int) -> LidarDetections:
        """Detections of a sample, in the LiDAR frame; after `compute`, of any rank's sample."""
        return (self._gathered | self._detections)[row]

    def reset(self) -> None:
        """Forget all detections."""
        super().reset()
        self._detections, self._gathered = {}, {}

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        super()._sync_dist(dist_sync_fn, process_group)
        group = process_group or self.process_group
        per_rank: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(per_rank, self._detections, group=group)
        self._gathered = {row: found for rank in reversed(per_rank) for row, found in rank.items()}


class NuScenesDetectionMetric(DetectionCollector):
    """NuScenes mAP, true-positive errors and NDS of all ranks' detections.

    `compute` gives the `ScoredSplit` for `write_run`, on every rank. `uncounted_classes` are those of which
    no annotation counts: their AP is 0, and part of the mAP.

    Args:
        index: the data set.
        rows: (S,) sample rows of the index that are scored, each once.
        class_names: what the labels of the detector index.
        may_be_partial: whether only those of the samples are scored that were detected in.
        split: what the samples are called where no annotation of theirs counts.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        UserError: No annotation counts.
    """

    def __init__(
        self,
        index: NuScenesIndex,
        rows: Ints,
        class_names: Sequence[str] = NUSCENES.names,
        may_be_partial: bool = False,
        split: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(rows, class_names, index.task, **kwargs)
        self._annotations = ground_truth(index, self._rows)
        self.uncounted_classes = check_countable(index, self._rows, self._annotations, split)
        self._index, self._may_be_partial = index, may_be_partial

    def compute(self) -> ScoredSplit:
        """Score the detections of all ranks.

        Raises:
            UserError: Samples are missing.
        """
        found = self._of_all_ranks()
        rows, annotations = self._rows, self._annotations
        if self._may_be_partial:
            rows = np.array([row for row in self._rows if row in found])
            annotations = ground_truth(self._index, rows)
        predictions = predictions_from_detections(self._index, rows, found)
        return ScoredSplit(annotations.samples.tokens, predictions, evaluate(annotations, predictions))


def _on_host(detections: Sequence[DetectionsOfSample], class_ids: Ints) -> Iterator[LidarDetections]:
    """The best detections of each sample; a copy a column, for all samples together."""
    if not detections:
        return
    by_sample = [(found.boxes, found.scores, found.labels) for found in detections]
    joined = [torch.cat(column).detach().cpu().numpy() for column in zip(*by_sample, strict=True)]
    ends = np.cumsum([len(found.scores) for found in detections])[:-1]
    for boxes, scores, labels in zip(*(np.split(column, ends) for column in joined), strict=True):
        yield best_detections(LidarDetections(boxes, scores, class_ids[labels]))
