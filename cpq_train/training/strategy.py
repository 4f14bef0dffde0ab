"""DDP with settings that fit a quantized network."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from cpq_train.quantization.batchnorm import trains_on_parts_of_a_batch


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
