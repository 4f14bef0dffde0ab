"""DDP with settings that fit a quantized network."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.quantization.batchnorm import joins_batches_of_ranks, trains_on_parts_of_a_batch


class QuantDDPStrategy(DDPStrategy):
    """Lightning's DDP, which leaves the ranges alone; arguments as there.

    Each forward pass of plain DDP sends every buffer from rank 0 to the others. The ranges are equal on all
    ranks, and writing to one has it worked out, and read from its device, anew. So buffers are sent only
    where a BatchNorm takes its statistics from one rank's samples.
    """

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.broadcast_buffers = trains_on_parts_of_a_batch(self.model)


def check_batch_statistics(network: nn.Module, device: torch.device) -> None:
    """Where several ranks train BatchNorm: warn that each sees its own samples, unless they are joined.

    Raises:
        UserError: They are to be joined on a device that cannot.
    """
    if joins_batches_of_ranks(network) and device.type != "cuda":
        raise UserError(f"trainer.sync_batchnorm is true on {device.type}; accepted: false, or CUDA")
    if trains_on_parts_of_a_batch(network):
        rank_zero_warn(
            "BatchNorm trains on each rank's own samples; trainer.sync_batchnorm (CUDA only) joins them"
        )
