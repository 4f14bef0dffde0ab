"""A network against itself with the integer reference in place of its integer layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.switches import quantized_layers
from cpq_train.quantization.verification.observation import (
    Array,
    Observed,
    arguments_in_order,
    evaluate,
    in_the_order_of,
    observing,
    run,
    why_not_covered,
)
from cpq_train.sparse import SparseConvTensor

FLIP_REASON = (
    "float layers and the float operations between integer layers may round differently with another memory "
    "layout, thread count or device; a value beside a tie then takes the next code"
)


@dataclass
class Flips:
    """How far the two networks are apart.

    Args:
        num_codes: Codes entering integer layers.
        num_flipped: Those that differ by one step.
        num_further: Those that differ by more.
        by_layer: Layer -> codes that differ, where any do.
        num_outputs: Numbers in the networks' outputs.
        mismatched_outputs: Those that differ.
        largest_difference: Of the outputs.
    """

    num_codes: int = 0
    num_flipped: int = 0
    num_further: int = 0
    by_layer: dict[str, int] = field(default_factory=dict)
    num_outputs: int = 0
    mismatched_outputs: int = 0
    largest_difference: float = 0.0

    @property
    def flipped_share(self) -> float:
        """Share of the codes that differ by one step."""
        return self.num_flipped / max(self.num_codes, 1)

    def count_codes(self, name: str, steps: Array) -> None:
        """Take in the distances between the codes of a layer."""
        self.num_codes += steps.size
        self.num_flipped += int(np.count_nonzero(steps == 1))
        self.num_further += int(np.count_nonzero(steps > 1))
        if steps.any():
            self.by_layer[name] = self.by_layer.get(name, 0) + int(np.count_nonzero(steps))

    def count_outputs(self, ours: Tensor, theirs: Tensor) -> None:
        """Take in one tensor of the networks' outputs."""
        self.num_outputs += ours.numel()
        self.mismatched_outputs += int((ours != theirs).sum())
        if ours.numel():
            self.largest_difference = max(self.largest_difference, float((ours - theirs).abs().max()))


class Outputs(NamedTuple):
    """Of the network, and of the network on the reference."""

    ours: Any
    reference: Any


def verify_end_to_end(network: nn.Module, inputs: Sequence[Any], flips: Flips) -> Outputs:
    """Run a network twice, with its own integer layers and with the reference in their place, and compare.

    Where codes differ although the layers agree one by one, see `FLIP_REASON`.

    Args:
        network: A calibrated network.
        inputs: Arguments of its forward pass.
        flips: The differences are added here.

    Raises:
        UserError: A layer's input has values without integer codes, or its output has other voxels than the
            reference finds.
    """
    seen: dict[str, Observed] = {}
    layers = {n: layer for n, layer in quantized_layers(network).items() if not why_not_covered(layer)}
    with observing(layers, lambda name, _, __, observed: seen.update({name: _codes_only(observed)})):
        ours = run(network, inputs)

    def take(name: str, codes: Array) -> None:
        flips.count_codes(name, np.abs(seen[name].codes - codes))

    with _reference_in_place_of(layers, seen, take):
        theirs = run(network, inputs)
    for pair in zip(_tensors(ours), _tensors(theirs), strict=True):
        flips.count_outputs(*pair)
    return Outputs(ours, theirs)


def _codes_only(observed: Observed) -> Observed:
    codes, nothing = observed.codes.astype(np.int32), observed.output[:0]
    return observed._replace(codes=codes, weight_codes=nothing, sums=None, output=nothing)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


@contextmanager
def _reference_in_place_of(
    layers: Mapping[str, Any], seen: Mapping[str, Observed], take: Callable[[str, Array], None]
) -> Iterator[None]:
    """While open, the layers compute with the reference and hand the codes of their inputs to `take`."""
    for name, layer in layers.items():
        layer.forward = _reference_forward(name, layer, seen, take)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _reference_forward(
    name: str, layer: Any, seen: Mapping[str, Observed], take: Callable[[str, Array], None]
) -> Callable[..., Any]:
    def forward(*given: Any, **by_name: Any) -> Any:
        arguments = arguments_in_order(layer, given, by_name)
        result = evaluate(name, layer, arguments)
        take(name, result.codes)
        x = arguments[0]
        if not isinstance(x, SparseConvTensor):
            return torch.from_numpy(result.output).to(x.device)
        result, num_lost = in_the_order_of(seen[name], result)
        if num_lost or np.isnan(result.output).any():
            raise UserError(f"layer {name!r}: its output has other voxels than the reference finds")
        out = x.replace_feature(torch.from_numpy(result.output).to(x.features.device))
        out.indice_dict = seen[name].indice_dict  # a later inverse convolution asks for what it undoes
        if not layer.subm:
            out.indices = torch.from_numpy(result.positions).to(x.indices)
            out.spatial_shape = list(seen[name].shape)
        return out

    return forward
