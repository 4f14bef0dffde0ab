"""The float teacher of a fine-tuning, and a training step's forward pass with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpq_train.arms import Arm, from_weights
from cpq_train.errors import UserError
from cpq_train.interop.checkpoint import read_checkpoint, sha256_of
from cpq_train.models import HeadOutput, NetworkConfig
from cpq_train.models.centerpoint import CenterPoint
from cpq_train.models.distillation import DistillationConfig, distillation_loss, run_observed

STUDENTS: tuple[Arm, ...] = ("qat", "float_tuned")
FLOAT_ARMS: tuple[Arm, ...] = ("float", "float_tuned")


def teacher_path(config: DistillationConfig, arm: Arm, weights: str | None) -> str:
    """The checkpoint of the teacher.

    Args:
        config: Names it, or leaves it to `weights`.
        arm: What is being trained.
        weights: `model.weights`.

    Raises:
        UserError: `arm` learns from no teacher, or there is no float checkpoint.
    """
    if arm not in STUDENTS:
        raise UserError(f"model.distillation is for model.arm {' or '.join(STUDENTS)}, not for {arm!r}")
    path = config.teacher or weights
    given = "model.distillation.teacher" if config.teacher else "model.weights"
    source = None if path is None else read_checkpoint(path)["quantization"]["arm"]
    if path is None or source not in FLOAT_ARMS:
        raise UserError(
            f"model.distillation needs a float teacher, and {given} {path!r} is {source!r}: "
            f"give model.distillation.teacher, a checkpoint of the arm {' or '.join(FLOAT_ARMS)}"
        )
    return path


class Teacher:
    """A frozen float network with BatchNorm folded.

    No nn.Module, so that the detector that holds it neither saves nor trains nor wraps it.

    Args:
        path: Float checkpoint.
        network: Sizes of the network; those of the checkpoint must agree.
        device: Where to keep it.

    Raises:
        UserError: The checkpoint is unreadable or of another architecture.
    """

    def __init__(self, path: str, network: NetworkConfig, device: torch.device) -> None:
        self.sha256 = sha256_of(path)
        self.network = from_weights(network, path, "float_tuned", None).network
        self.network.dense_channels_last()
        self.network.to(device).eval().requires_grad_(False)

    def instruct(
        self,
        student: CenterPoint,
        batch: Mapping[str, Any],
        config: DistillationConfig,
        code_weights: Sequence[float],
    ) -> tuple[list[HeadOutput], dict[str, Tensor]]:
        """One forward pass of each; nothing of the teacher's is kept for a backward pass through it.

        Returns:
            The student's raw outputs by head, and the parts of the loss (`distillation_loss`).
        """
        voxels = batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]
        with torch.no_grad():
            example = run_observed(self.network, *voxels)
        own = run_observed(student, *voxels)
        return own.heads, distillation_loss(own, example, config, code_weights)
