"""Ranges that move while the network trains."""

from __future__ import annotations

from torch import nn

from cpq_train.quantization.ranges.policy import RangePolicy, finish_observing, start_observing


class MovingRanges:
    """Lets quantizers look at the tensors of a step, all its accumulated batches, and moves their ranges.

    Args:
        policy: In which steps ranges move, and how far.
    """

    def __init__(self, policy: RangePolicy) -> None:
        self._policy = policy
        self._is_observing = False

    def begin_batch(self, network: nn.Module, step: int) -> None:
        """Look from here on, if ranges move in this step of the optimizer."""
        if not self._is_observing and self._policy.moves_at(step):
            self._is_observing = True
            start_observing(network)

    def move(self, network: nn.Module) -> None:
        """Move the ranges towards what was seen; nothing to do where nobody looked."""
        if self._is_observing:
            finish_observing(network, self._policy.momentum)
            self._is_observing = False
