"""Loaders of samples, which count the clouds that samples do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from cpq_train.data.bad_sweeps import BadSweepLimit
from cpq_train.data.cloud_files import CloudFiles
from cpq_train.data.dataset import DetectionDataset, Item, collate
from cpq_train.data.loader import FollowingLoader, start_worker


def sample_loader(
    dataset: DetectionDataset | CloudFiles,
    num_workers: int,
    report: Callable[[int], None] | None = None,
    **order: Any,
) -> DataLoader[Item]:
    """A loader of batches.

    Args:
        dataset: the samples.
        num_workers: processes; 0 loads in this one.
        report: is told how many clouds the batches of an epoch lack so far.
        **order: of DataLoader: batch_size, sampler or batch_sampler.
    """
    return FollowingLoader(
        dataset,
        **order,
        limit=_limit(dataset, report, order),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=start_worker,
    )


def _limit(
    dataset: DetectionDataset | CloudFiles, report: Callable[[int], None] | None, order: dict[str, Any]
) -> BadSweepLimit | None:
    config = dataset.config
    if not config.skips_bad_sweeps:
        return None
    batches = order.get("batch_sampler")
    num_samples = len(order.get("sampler", dataset)) if batches is None else sum(map(len, batches))
    return BadSweepLimit(config.max_bad_sweeps, num_samples * config.num_sweeps, report)
