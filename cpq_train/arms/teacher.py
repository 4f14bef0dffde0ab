"""The float teacher of a fine-tuning, and a training step's forward pass with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpq_train.arms.description import Description
from cpq_train.arms.loading import from_weights
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import FLOAT_ARMS, TUNED_ARMS
from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.models import HeadOutput, NetworkConfig
from cpq_train.models.centerpoint import CenterPoint
from cpq_train.models.distillation import DistillationConfig, distillation_loss, run_observed
from cpq_train.models.normalisers import SumOverRanks, one_rank


class Teacher:
    """A frozen float network with BatchNorm folded.

    No nn.Module, so that the detector that holds it neither saves nor trains nor wraps it.

    Args:
        path: Float checkpoint.
        network: Sizes of the network; those of the checkpoint must agree.
        device: Where to keep it.
        config: Weights of the parts of the loss.

    Raises:
        UserError: The checkpoint is unreadable or of another architecture.
    """

    def __init__(
        self, path: str, network: NetworkConfig, device: torch.device, config: DistillationConfig
    ) -> None:
        self.sha256 = sha256_of(path)
        self.config = config
        self.network = from_weights(network, path, "float_tuned", batchnorm="folded").network
        self.network.dense_channels_last()
        self.network.to(device).eval().requires_grad_(False)

    def instruct(
        self,
        student: CenterPoint,
        batch: Mapping[str, Any],
        code_weights: Sequence[float],
        sum_over_ranks: SumOverRanks = one_rank,
    ) -> tuple[list[HeadOutput], dict[str, Tensor]]:
        """One forward pass of each; nothing is kept for a backward pass through the teacher.

        Args:
            student: The network that is trained.
            batch: Voxels, as the detector gets them.
            code_weights: Weight of each of the ten numbers of a box code.
            sum_over_ranks: See `distillation_loss`.

        Returns:
            The student's raw outputs by head, and the parts of the loss (`distillation_loss`).
        """
        voxels = batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]
        with torch.no_grad():
            example = run_observed(self.network, *voxels)
        own = run_observed(student, *voxels)
        return own.heads, distillation_loss(own, example, self.config, code_weights, sum_over_ranks)


def find_teacher(
    config: DistillationConfig, subject: Subject, weights: str | None, is_resumed: bool
) -> Teacher:
    """The teacher of `subject`, on its device and noted among its parents.

    Args:
        config: Names its checkpoint, or leaves it to `weights`.
        subject: What is trained.
        weights: `model.weights`.
        is_resumed: Whether `subject` goes on with a run, whose teacher it must then be.

    Raises:
        UserError: The arm learns from no teacher, there is no float checkpoint, or it is not the run's.
    """
    if subject.arm not in TUNED_ARMS:
        raise UserError(
            f"model.distillation is for model.arm {' or '.join(TUNED_ARMS)}, not for {subject.arm!r}"
        )
    path = _float_checkpoint(config.teacher or weights)
    device = next(subject.network.parameters()).device
    teacher = Teacher(path, subject.network.config, device, config)
    known = subject.parents.get("teacher", teacher.sha256)
    if is_resumed and known != teacher.sha256:
        raise UserError(f"teacher {path!r} is not the one the run began with, whose SHA-256 is {known}")
    subject.parents["teacher"] = teacher.sha256
    return teacher


def _float_checkpoint(path: str | None) -> str:
    arm = None if path is None else Description.of(read_checkpoint(path, mmap=True), path).arm
    if path is None or arm not in FLOAT_ARMS:
        raise UserError(
            f"model.distillation needs a float teacher, and {path!r} is {arm!r}: "
            f"give model.distillation.teacher, a checkpoint of the arm {' or '.join(FLOAT_ARMS)}"
        )
    return path
