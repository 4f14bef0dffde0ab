"""Quantization switched off and on, as a whole or layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import HAS_BF16
from cpq_train.quantization.layers import QuantAdd, QuantizedConvolution
from cpq_train.quantization.quantizer import Quantizer

QuantizedLayer = QuantizedConvolution | QuantAdd

GradientPrecision = Literal["fp32", "bf16"]


def quantizers(network: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer under the first name it is saved by; a shared one appears once."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Quantizer)}


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """Every layer of which something is quantized, in the order of the network."""
    return {name: m for name, m in network.named_modules() if isinstance(m, QuantizedConvolution | QuantAdd)}


def compute_gradients_in(network: nn.Module, precision: GradientPrecision) -> None:
    """Choose the precision of the gradients of dense convolutions; codes and their sums stay exact.

    bf16 gives gradients as good as those of mixed precision: a relative error of some 2e-3.

    Raises:
        UserError: The processor has no instructions for it, so that it would be slow.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for name, layer in quantized_layers(network).items():
        if isinstance(layer, QuantizedConvolution):
            if precision == "bf16" and layer.weight.device.type == "cpu" and not HAS_BF16:
                raise UserError(
                    f"gradients are bf16, and {name} is on a processor with neither AVX512_BF16 nor AMX; "
                    "accepted there: fp32"
                )
            layer.gradients = dtype


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """While open, the network is in evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quantizers_off(network: nn.Module) -> Iterator[None]:
    """While open, the network computes in float (with BatchNorm folded as it is)."""
    changed = [q for q in quantizers(network).values() if not q._disabled]
    for quantizer in changed:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in changed:
            quantizer.enable()


@contextmanager
def only_quantized(network: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While open, the layers of these names are quantized and all others are float ones."""
    kept = set(names)
    changed = [m for n, m in quantized_layers(network).items() if n not in kept and not m.is_bypassed]
    for layer in changed:
        layer.is_bypassed = True
    try:
        yield
    finally:
        for layer in changed:
            layer.is_bypassed = False
