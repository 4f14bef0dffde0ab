"""Bias correction: takes the mean error that quantization causes in a layer out of its bias.

Empirical bias correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction" (ICCV 2019), section 4.2, cross-layer: a layer is measured with every layer before it corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.quantization.batchnorm import kept_batchnorms
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.prepared import frozen, prepared_of
from cpq_train.quantization.ptq.twins import Twins
from cpq_train.sparse import SparseConvTensor

Hook = Callable[[str, Any], Any]


class _MeanError:
    """Running mean over places of what a layer puts out too much, per channel, in fp64."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._num_places = 0

    def add(self, error_C: Tensor, num_places: int) -> None:
        self._total = self._total + error_C * num_places
        self._num_places += num_places

    @property
    def value(self) -> Tensor | float:
        return self._total / max(self._num_places, 1)


@torch.no_grad()
def correct_biases(twins: Twins) -> None:
    """Shift the biases of the quantized convolutions so that every channel keeps its float mean.

    Each batch runs once in float and once quantized; in the second pass a layer's mean error is taken off its
    output at once, so that the layers behind it are measured on corrected inputs. The errors, averaged over
    all places of all batches, go into the biases. A layer without a bias gets one, unless a BatchNorm follows
    it: then they go into its running mean, which has the same effect.

    Args:
        twins: The networks and the batches.
    """
    errors = {name: _MeanError() for name in _convolutions(twins.network)}
    with frozen(twins.network):
        for batch in twins.track(twins.batches, "Correcting biases"):
            _measure(twins, batch, errors)
    kept = kept_batchnorms(twins.network, prepared_of(twins.network).folds)
    norms = {layer: cast(_BatchNorm, twins.network.get_submodule(norm)) for norm, layer in kept.items()}
    for name, layer in _convolutions(twins.network).items():
        _take_off(errors[name].value, layer, norms.get(name))


def _measure(twins: Twins, batch: Any, errors: dict[str, _MeanError]) -> None:
    wanted: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        wanted[name] = _mean(output)

    def correct(name: str, output: Any) -> Any:
        error_C = _mean(output) - wanted[name]
        errors[name].add(error_C, _num_places(output))
        return _minus(output, error_C)

    for network, hook in ((twins.float_network, record), (twins.network, correct)):
        with _output_hooks(network, hook):
            twins.forward(network, batch)


def _convolutions(network: nn.Module) -> dict[str, QuantizedConvolution]:
    return {name: m for name, m in network.named_modules() if isinstance(m, QuantizedConvolution)}


@contextmanager
def _output_hooks(network: nn.Module, hook: Hook) -> Iterator[None]:
    """While open, `hook` sees the name and the output of every quantized convolution, and may replace it."""
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: hook(name, output))
        for name, layer in _convolutions(network).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Tensor | SparseConvTensor) -> Tensor:
    features: Tensor = output.features if isinstance(output, SparseConvTensor) else output
    return features


def _num_places(output: Any) -> int:
    features = _features(output)
    return features.numel() // features.shape[1]


def _mean(output: Any) -> Tensor:
    """Mean of each channel (C,) over voxels, or over batch, rows and columns; 0 where there is no voxel."""
    features = _features(output)
    places = [d for d in range(features.dim()) if d != 1]
    return features.sum(places, dtype=torch.float64) / max(_num_places(output), 1)


def _minus(output: Any, error_C: Tensor) -> Any:
    features = _features(output)
    shift = error_C.to(features.dtype).view(-1, *[1] * (features.dim() - 2))
    corrected = features - shift
    return output.replace_feature(corrected) if isinstance(output, SparseConvTensor) else corrected


def _take_off(error_C: Tensor | float, layer: QuantizedConvolution, norm: _BatchNorm | None) -> None:
    if layer.bias is None and norm is not None and norm.running_mean is not None:
        norm.running_mean.copy_(norm.running_mean.double() + error_C)
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_channels))
    layer.bias.copy_(layer.bias.double() - error_C)
