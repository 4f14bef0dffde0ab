"""What the network learns from a batch: the loss of CenterPoint and, where there is one, a teacher's part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpq_train.arms.teacher import Teacher
from cpq_train.models import CenterPoint, HeadOutput
from cpq_train.models.losses import center_loss
from cpq_train.models.targets import assign_targets
from cpq_train.quantization.ranks import sum_over_ranks


def training_losses(
    network: CenterPoint,
    batch: Mapping[str, Any],
    code_weights: Sequence[float],
    loc_weight: float,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """Loss of a batch, whose mean over the ranks is that of all their samples.

    Args:
        network: What is trained.
        batch: Voxels and boxes, on the network's device; `targets` of the boxes where they were made before.
        code_weights: Loss weight of each of the ten numbers of a box code.
        loc_weight: Weight of the box losses against the heat-map losses.
        teacher: Whom the network learns from beside the boxes.

    Returns:
        `loss` and its parts, scalars.
    """
    targets = batch.get("targets") or assign_targets(batch["gt_boxes"], network.config)
    heads, distilled = _outputs(network, batch, code_weights, teacher)
    losses = center_loss(heads, targets, code_weights, loc_weight, sum_over_ranks)
    if distilled:
        total = torch.stack([losses["loss"], *distilled.values()]).sum()
        losses = {**losses, **distilled, "loss": total}
    return losses


def _outputs(
    network: CenterPoint, batch: Mapping[str, Any], code_weights: Sequence[float], teacher: Teacher | None
) -> tuple[list[HeadOutput], dict[str, Tensor]]:
    """Raw outputs of every head and, where there is a teacher, its parts of the loss."""
    if teacher is not None:
        return teacher.instruct(network, batch, code_weights, sum_over_ranks)
    return network(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]), {}
