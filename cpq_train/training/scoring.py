"""The nuScenes scores of a detector outside of Lightning's own validation."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule

from cpq_train.common.progress import track
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.evaluation.lightning_metric import NuScenesDetectionMetric
from cpq_train.training.detector import CenterPointDetector


def check_unseen(detector: LightningModule, data: NuScenesDataModule) -> None:
    """See that a network is not scored on what it, or one that it came from, was trained on.

    Raises:
        UserError: It is, and `data.force_score_on_train` is false.
    """
    assert isinstance(detector, CenterPointDetector)
    data.selection.check_unseen(detector.trained_on.get(data.index.fingerprint), "the network was trained on")


def score_detector(
    detector: CenterPointDetector,
    data: NuScenesDataModule,
    title: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Detect in the validation samples and score.

    Args:
        detector: On its device; its mode is kept.
        data: Gives each rank its share of the samples.
        title: Of its progress; None shows none.
        rank: This process.
        world_size: Number of processes; all of them take part.

    Returns:
        mAP, and NDS where there is one, over the samples of all ranks.
    """
    check_unseen(detector, data)
    metric = NuScenesDetectionMetric(data.index, data.eval_rows, data.class_names, split=data.splits.val).to(
        detector.device
    )
    loader = data.evaluation_dataloader(rank, world_size)
    was_training = detector.training
    detector.eval()
    with torch.no_grad():
        for batch in track(loader, title):
            metric.update(batch["sample_rows"], detector.detect(detector.to_device(batch)))
    detector.train(was_training)
    return metric.compute().scores.headline
