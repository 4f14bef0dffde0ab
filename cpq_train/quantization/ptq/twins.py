"""A quantized network beside its float self: what every method needs that fits the one to the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cpq_train.common.progress import track
from cpq_train.quantization.switches import quantizers
from cpq_train.sparse import SparseConvTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Twins:
    """Two networks of one structure and the batches that both are fed.

    Args:
        network: The quantized network, its ranges found, in evaluation mode.
        float_network: The same with float weights and every quantizer off.
        batches: Few: they are held in memory.
        forward: Runs either network on one batch.
        show_progress: Whether it is shown how far a method has come.
    """

    network: nn.Module
    float_network: nn.Module
    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], Any]
    show_progress: bool = False

    @classmethod
    def of(
        cls,
        network: nn.Module,
        batches: Sequence[Any],
        forward: Callable[[nn.Module, Any], Any],
        show_progress: bool = False,
    ) -> Twins:
        """Copies the network as it is now: its weights are still the float ones."""
        float_network = copy.deepcopy(network)
        for quantizer in quantizers(float_network).values():
            quantizer.disable()
        return cls(network, float_network, batches, forward, show_progress)

    def track(self, items: Iterable[T], text: str) -> Iterable[T]:
        """The items, and how far their loop has come."""
        return track(list(items), text if self.show_progress else None)


def ordered_tensors(value: Any) -> list[Tensor]:
    """The tensors of a module's output: a tensor, a sparse one, or a mapping or sequence of such.

    Rows of a sparse tensor are ordered by voxel: two passes need not agree on their order.
    """
    if isinstance(value, SparseConvTensor):
        return [value.features[_voxel_numbers(value).argsort()]]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in ordered_tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in ordered_tensors(item)]
    return [value]


def _voxel_numbers(x: SparseConvTensor) -> Tensor:
    number, *places = x.indices.long().unbind(1)
    for place, size in zip(places, x.spatial_shape, strict=True):
        number = number * size + place
    return cast(Tensor, number)


def squared_error(output: Any, target: Any) -> Tensor:
    """Squared error of a module's output: summed over channels and tensors, averaged over places."""
    pairs = zip(ordered_tensors(output), ordered_tensors(target), strict=True)
    return torch.stack([_squared_error(a, b) for a, b in pairs]).sum()


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    num_places = max(output.numel() // output.shape[1], 1)
    return (output - target).square().sum() / num_places
