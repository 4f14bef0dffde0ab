"""Targets that are made on the host, while the device is at work on the batch before."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule
from typing_extensions import override

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.models import NetworkConfig
from cpq_train.models.targets import assign_targets


class HostTargets(LightningModule):
    """Gives a batch that travels to a GPU its targets: the boxes are on the CPU by then, and cost no wait.

    Attributes:
        network_config: Of the network that is trained.
    """

    network_config: NetworkConfig

    @override
    def setup(self, stage: str) -> None:
        """Lightning warns of a hook that a data module has too; those of this project have none of it."""
        warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer`.*")

    @override
    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """The batch, with `targets` in training on a GPU."""
        if not self.trainer.training or are_numbers_at_hand(self.device):
            return batch
        targets = assign_targets(batch["gt_boxes"], self.network_config)
        if self.device.type == "cuda":
            targets = type(targets)(*(tensor.pin_memory() for tensor in targets))  # or the copy would wait
        return {**batch, "targets": targets}
