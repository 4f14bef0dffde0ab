"""Biases that the arithmetic of their layer cannot hold, and steps widened for their sake.

A bias may have to be a whole multiple of step_x * step_w. A channel whose weights are next to nothing has a
step next to nothing, and its bias a code that no sum of 32 bits holds. Widened, the step loses weights that
hardly count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.health import WEIGHT_QUANTIZER, Problem, table
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.numerics.biases import FITTED_BIAS_CODE, LARGEST_BIAS_CODE
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.switches import quantized_layers

NUM_SHOWN = 4
"""Channels that a table names."""


@torch.no_grad()
def widen_steps(network: nn.Module) -> dict[str, list[int]]:
    """Make steps that are too small for a bias larger, in place, in the layers whose scheme says so.

    Args:
        network: Calibrated.

    Returns:
        Layer -> its output channels that were too small.
    """
    widened = {}
    for name, layer, weight_quantizer, multiples in _layers(network):
        too_large = multiples > LARGEST_BIAS_CODE
        if layer.widens_steps and weight_quantizer.amax is not None and too_large.any():
            _widen(weight_quantizer, layer.weight, torch.where(too_large, multiples / FITTED_BIAS_CODE, 1.0))
            widened[name] = too_large.nonzero().flatten().tolist()
    return widened


def _widen(quantizer: Quantizer, weight: Tensor, factor: Tensor) -> None:
    """Multiply steps; the factors of all channels of a step are there, and the largest counts."""
    assert quantizer.amax is not None
    step = quantizer.range_of(weight).step
    factor = factor.view(-1, step.numel()).amax(0).view_as(step)
    amax = (step * factor * quantizer.format.qmax).to(quantizer.amax)
    quantizer.set_amax(torch.where(factor > 1, amax, quantizer.amax))


def check_biases(network: nn.Module, where: str = "") -> None:
    """Whether the arithmetic of every layer can hold its bias.

    Args:
        network: Calibrated.
        where: What the sentence starts with, such as a checkpoint's name and a colon.

    Raises:
        UserError: It cannot, with a table of the layers.
    """
    if problems := bias_problems(network):
        raise UserError(f"{where}{len(problems)} layers cannot hold their bias:\n{table(problems)}")


@torch.no_grad()
def bias_problems(network: nn.Module) -> list[Problem]:
    """The layers of a calibrated network whose bias has no place in their arithmetic, by weight quantizer."""
    text = "step too small for the bias; accepted: on_small_step: widen, or bias: float"
    found = [
        (name, layer, multiples > LARGEST_BIAS_CODE, text) for name, layer, _, multiples in _layers(network)
    ]
    for name, layer in quantized_layers(network).items():
        if isinstance(layer, QuantizedConvolution) and layer.bias_kind == "fp16" and layer.bias is not None:
            found.append((name, layer, layer.bias.half().isinf(), "bias beyond fp16; accepted: up to 65504"))
    return [
        Problem(f"{name}.{WEIGHT_QUANTIZER}", layer.kind, text, _channels(is_bad))
        for name, layer, is_bad, text in found
        if is_bad.any()
    ]


def _channels(is_bad: Tensor) -> str:
    """How many of how many channels, and the first of them."""
    channels = is_bad.nonzero().flatten().tolist()
    more = ", ..." if len(channels) > NUM_SHOWN else ""
    return f"{len(channels)} of {len(is_bad)}, channels {', '.join(map(str, channels[:NUM_SHOWN]))}{more}"


def _layers(network: nn.Module) -> Iterator[tuple[str, QuantizedConvolution, Quantizer, Tensor]]:
    """Layers that add their bias to the sum: name, layer, quantizer of the weight, |bias| / unit by channel.

    Not those whose input range is dynamic: its unit is not known before the input is.
    """
    for name, layer in quantized_layers(network).items():
        if not isinstance(layer, QuantizedConvolution) or layer.bias_kind != "accumulator":
            continue
        x, w = layer._input_quantizer, layer._weight_quantizer
        assert x is not None
        assert w is not None
        if layer.bias is not None and x.amax is not None:
            yield name, layer, w, layer.bias.double().abs() / layer.unit().double()
