"""Quantization switched off and on, as a whole or layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from cpq_train.quantization.layers import QuantAdd, QuantizedConvolution
from cpq_train.quantization.quantizer import Quantizer

QuantizedLayer = QuantizedConvolution | QuantAdd


def quantizers(network: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer under the first name it is saved by; a shared one appears once."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Quantizer)}


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """Every layer of which something is quantized, in the order of the network."""
    return {name: m for name, m in network.named_modules() if isinstance(m, QuantizedConvolution | QuantAdd)}


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
