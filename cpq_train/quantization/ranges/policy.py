"""What becomes of the ranges in training: they stay, move with the tensors, or are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.health import is_weight
from cpq_train.quantization.ranges.bias_steps import widen_steps
from cpq_train.quantization.switches import quantized_layers, quantizers

AmaxPolicy = Literal["frozen", "moving", "learned"]


@dataclass(frozen=True)
class RangePolicy:
    """What becomes of static ranges in quantization-aware training.

    Args:
        amax: frozen (as calibrated); moving (every `every_num_steps` steps amax moves towards what the
            scheme's method finds in the tensors of that step, until `num_moving_steps`, then it is frozen);
            learned (LSQ: a parameter of the optimizer).
        lr: Largest learning rate of log(amax) where it is learned, on the schedule of the weights. A step
            moves a range by about this share: a short run wants more of it than a long one.
        every_num_steps: See `amax`.
        num_moving_steps: See `amax`.
        momentum: Share of the new amax each time a range moves.
    """

    amax: AmaxPolicy = "frozen"
    lr: float = 0.001
    every_num_steps: int = 10
    num_moving_steps: int = 1000
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"ranges.lr: got {self.lr}, accepted: above 0")
        if not 0 < self.momentum <= 1:
            raise UserError(f"ranges.momentum: got {self.momentum}, accepted: above 0, up to 1")
        if self.every_num_steps < 1:
            raise UserError(f"ranges.every_num_steps: got {self.every_num_steps}, accepted: 1 or more")

    def moves_at(self, step: int) -> bool:
        """Whether ranges move in the training step `step`, counted from 0."""
        return self.amax == "moving" and step < self.num_moving_steps and step % self.every_num_steps == 0


def apply_policy(network: nn.Module, amax: AmaxPolicy) -> None:
    """Make every static amax a parameter where ranges are learned, a mere buffer where they are not."""
    for quantizer in quantizers(network).values():
        if amax == "learned":
            quantizer.learn()
        else:
            quantizer.freeze()


def range_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The learned ranges, each once."""
    return [q._log_amax for q in quantizers(network).values() if q._log_amax is not None]


def start_observing(network: nn.Module) -> None:
    """Let the quantizers of inputs gather ranges while they go on rounding."""
    for name, quantizer in quantizers(network).items():
        if not is_weight(name):
            quantizer.start_collecting()


@torch.no_grad()
def finish_observing(network: nn.Module, momentum: float) -> None:
    """Move the ranges towards what was gathered, and those of the weights towards the present weights.

    Args:
        network: What `start_observing` was given, after one or more forward passes.
        momentum: Share of the new amax.
    """
    for name, quantizer in quantizers(network).items():
        if not is_weight(name):
            quantizer.finish_collecting(momentum)
    for layer in quantized_layers(network).values():
        weight_quantizer = getattr(layer, "_weight_quantizer", None)
        if weight_quantizer is not None:
            weight_quantizer.set_amax_from(layer.weight, momentum)
    widen_steps(network)
