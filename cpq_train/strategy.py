"""DDP with settings that fit a quantized network."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from typing_extensions import override

from cpq_train.quantization.batchnorm import trains_on_parts_of_a_batch


@StrategyRegistry.register("ddp", override=True, description="DDP with the settings of cpq_train")
class QuantDDPStrategy(DDPStrategy):
    """Lightning's DDP, which leaves the ranges alone; `trainer.strategy` auto and ddp mean this one.

    Each forward pass of plain DDP sends every buffer from rank 0 to the others. The ranges are equal on all
    ranks, and writing to one has it worked out, and read from its device, anew. So buffers are sent only where
    a BatchNorm takes its statistics from one rank's samples. Gradients are views of DDP's buckets, which saves
    a copy of them. Settings that are given, as to Lightning's class, are kept.
    """

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        self._ddp_kwargs.setdefault("broadcast_buffers", trains_on_parts_of_a_batch(self.model))
        self._ddp_kwargs.setdefault("gradient_as_bucket_view", True)
        super().configure_ddp()
