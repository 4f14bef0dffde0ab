"""The weights of all layers of a network, rounded together: a few operations whatever their number.

Weights are joined, a row an output channel, and rounded; backward joins their gradients. That is done part by
part of the network, so that on several GPUs the gradients of one part travel while the next is computed.

Letters: N numbers, R rows, K channels of all outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.common.late import Mailbox
from cpq_train.quantization.layers.convolution import QuantizedConvolution, RoundedWeight
from cpq_train.quantization.numerics.biases import Bias, as_deployed, bias_codes
from cpq_train.quantization.numerics.exact_sum import LargestSums
from cpq_train.quantization.numerics.formats import log_range_divisor
from cpq_train.quantization.numerics.one_pass import Array
from cpq_train.quantization.numerics.rows import (
    Place,
    RowRanges,
    Rows,
    learn_rows,
    pass_rows,
    round_rows,
    sums_by_range,
)
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.range_table import Flat, RangeTable
from cpq_train.quantization.scope import version_of


@dataclass
class _Part:
    """Layers whose weights are rounded together.

    Attributes:
        layers: The layers.
        places: Where their weights lie.
        rows: Their output channels.
        divisor: Of the gradient of log(amax), by row.
        num_rows: By layer.
        first_row: Of the part among those of the network.
        has_wide_sums: Whether sums of one of them could pass what fp32 holds.
    """

    layers: list[QuantizedConvolution]
    places: list[Place]
    rows: Rows
    divisor: Tensor
    num_rows: list[int]
    first_row: int
    has_wide_sums: bool

    @property
    def span(self) -> slice:
        """Its rows among those of the network."""
        return slice(self.first_row, self.first_row + sum(self.num_rows))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Numbers of all layers, (N,)."""
        return torch.cat([place.joined(t) for place, t in zip(self.places, tensors, strict=True)])


class _Rounding(NamedTuple):
    """What the autograd node of a part needs beside its tensors."""

    part: _Part
    ranges: RowRanges
    factor: Tensor
    has_values: bool
    has_sums: bool
    made: list[Tensor]


class _RoundWeights(Function):
    """Weights, and log(amax) of those whose range is learned -> codes; `made` gets values and sums.

    The weights are not saved as torch saves tensors, which a backward pass frees: layers that only this node
    joins may have their backward passes one after the other.
    """

    @staticmethod
    def forward(ctx: Any, of: _Rounding, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights = tensors[: len(of.part.layers)]
        ctx.of, ctx.weights = of, weights
        ctx.versions = [version_of(w) for w in weights if w is not None]
        ctx.set_materialize_grads(False)
        joined = of.part.join([w for w in weights if w is not None])
        codes, *more = round_rows(joined, of.part.rows, of.ranges, of.has_values, of.has_sums)
        of.made.extend(more)
        return tuple(place.part_of(codes) for place in of.part.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of: _Rounding = ctx.of
        weights: tuple[Tensor, ...] = ctx.weights
        part, num_layers = of.part, len(weights)
        for layer, weight, version, grad in zip(part.layers, weights, ctx.versions, grads, strict=True):
            if grad is not None and version_of(weight) != version:
                raise RuntimeError(
                    f"the weight of {layer.kind}({layer.extra_repr()}) was modified by an inplace operation "
                    f"between forward and backward pass: it is at version {version_of(weight)}, expected "
                    f"version {version}"
                )
        known = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
        joined_grad, joined = part.join(known), part.join(weights)
        of_logs: list[Tensor | None] = [None] * num_layers
        if any(ctx.needs_input_grad[1 + num_layers :]):
            passed, sums = learn_rows(joined_grad, joined, part.rows, of.factor, of.ranges)
            by_layer = zip(part.layers, (sums / part.divisor).split(part.num_rows), strict=True)
            of_logs = [sums_by_range(one, _weight_quantizer(layer)._amax) for layer, one in by_layer]
        else:
            passed = pass_rows(joined_grad, joined, part.rows, of.factor, of.ranges.amax)
        of_weights = [place.part_of(passed) for place in part.places]
        needed = ctx.needs_input_grad[1:]
        found = [
            None if grad is None or not is_needed else one
            for one, grad, is_needed in zip([*of_weights, *of_logs], [*grads, *grads], needed, strict=True)
        ]
        return None, *found


class _Member(NamedTuple):
    """A layer of a table, and what its place there follows from."""

    layer: QuantizedConvolution
    x_quantizer: Quantizer
    w_quantizer: Quantizer
    weight: Tensor
    strides: tuple[int, ...]
    is_narrow: bool

    @classmethod
    def of(cls, layer: QuantizedConvolution) -> _Member:
        quantizers = _input(layer), _weight_quantizer(layer)
        return cls(layer, *quantizers, layer.weight, layer.weight.stride(), layer.is_narrow)

    @property
    def is_current(self) -> bool:
        """Whether it could be made of the layer now; looks past `nn.Module`, as it does so in every pass."""
        layer, modules = self.layer, self.layer._modules
        return (
            layer._parameters.get("weight") is self.weight
            and self.weight.dtype == torch.float32
            and self.weight.stride() == self.strides
            and modules["_input_quantizer"] is self.x_quantizer
            and modules["_weight_quantizer"] is self.w_quantizer
            and not (self.x_quantizer._disabled or self.w_quantizer._disabled or layer.is_bypassed)
        )


class WeightTable:
    """The integer layers of a network whose ranges are static, in its parts.

    Args:
        layers: Name -> layer; all quantized ones of the network.
        ranges: Of all their quantizers.
    """

    def __init__(self, layers: Mapping[str, Any], ranges: RangeTable) -> None:
        self._ranges = ranges
        self._mailbox, self._known = Mailbox(), dict[QuantizedConvolution, LargestSums]()
        of_part: dict[str, list[QuantizedConvolution]] = {}
        self._names, self._others = {}, []
        for name, layer in layers.items():
            if takes_part(layer):
                of_part.setdefault(name.partition(".")[0], []).append(layer)
                self._names[layer] = name
            else:
                self._others.append(layer)
        self._layers = [layer for members in of_part.values() for layer in members]
        self._members = [_Member.of(layer) for layer in self._layers]
        self._channels = [layer.out_channels for layer in self._layers]
        self._parts: list[_Part] = []
        if not self._layers:
            return
        rows = [layer.weight.shape[layer.axes.output] for layer in self._layers]
        self._row_weight = self._places(rows, _weight_quantizer)
        steps = [(rows, _input), (self._channels, _weight_quantizer), (self._channels, _input)]
        self._steps = torch.cat([self._places(lengths, quantizer_of) for lengths, quantizer_of in steps])
        self._num_steps = [sum(lengths) for lengths, _ in steps]
        for members in of_part.values():
            self._parts.append(_part(members, sum(len(part.divisor) for part in self._parts), ranges.device))

    def is_current(self, ranges: RangeTable) -> bool:
        """Whether it is what a table of its network would be now."""
        return (
            ranges is self._ranges
            and all(member.is_current for member in self._members)
            and not any(map(takes_part, self._others))
        )

    def _places(self, lengths: Sequence[int], quantizer_of: Callable[[Any], Quantizer]) -> Tensor:
        """Which of the ranges' numbers belongs to each row or channel; ranges of a group are repeated."""
        found = []
        for layer, length in zip(self._layers, lengths, strict=True):
            quantizer = quantizer_of(layer)
            found.append(self._ranges.start_of[quantizer] + torch.arange(length) % quantizer._amax.numel())
        return torch.cat(found).to(self._ranges.device)

    def round(self, flat: Flat) -> dict[QuantizedConvolution, RoundedWeight]:
        """Round all weights.

        Args:
            flat: What `RangeTable.work_out` said.

        Returns:
            By layer.
        """
        self._mailbox.receive()
        if not self._layers:
            return {}
        is_late = not are_numbers_at_hand(self._ranges.device)
        ranges = RowRanges(*(t[self._row_weight] for t in (flat.amax, flat.scale, flat.step)))
        factor, step_w, step_x = flat.step[self._steps].split(self._num_steps)
        made = [self._round_part(part, ranges, factor, is_late) for part in self._parts]
        codes = [one for of_part, _ in made for one in of_part]
        values = [one for _, of_part in made for one in of_part]
        unit = step_x * step_w
        units = unit.split(self._channels)
        by_layer = zip(
            codes, values, step_w.split(self._channels), units, self._biases(unit, units), strict=True
        )
        return {
            member.layer: RoundedWeight(
                *of_layer,
                is_narrow=member.is_narrow,
                known=self._known.get(member.layer),
                weight=member.weight,
                version=version_of(member.weight),
            )
            for member, of_layer in zip(self._members, by_layer, strict=True)
        }

    def _round_part(
        self, part: _Part, ranges: RowRanges, factor: Tensor, is_late: bool
    ) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        """Codes and values of a part's weights; values are for backward alone."""
        weights = [layer.weight for layer in part.layers]
        logs = [_weight_quantizer(layer)._log_amax for layer in part.layers]
        has_values = torch.is_grad_enabled()
        of_part = RowRanges(*(tensor[part.span] for tensor in ranges))
        rounding = _Rounding(part, of_part, factor[part.span], has_values, is_late and part.has_wide_sums, [])
        codes = _RoundWeights.apply(rounding, *weights, *logs)
        values, sums = rounding.made
        rounding.made.clear()  # the node keeps the list as long as a loss is kept
        dtypes = {layer.gradient_dtype for layer in part.layers}
        values = values.to(dtypes.pop()) if len(dtypes) == 1 else values
        if rounding.has_sums:
            self._mailbox.send(sums, lambda sums: self._learn_sums(part, sums))
        return codes, [place.part_of(values) if has_values else None for place in part.places]

    def _biases(self, unit: Tensor, units: Sequence[Tensor]) -> list[Bias]:
        """What `as_deployed` makes of the biases, those that become codes together."""
        pairs = list(zip(self._layers, units, strict=True))
        coded = [(x, unit) for x, unit in pairs if x.bias_kind == "accumulator" and x.bias is not None]
        if not coded:
            return [as_deployed(layer.bias, layer.bias_kind, unit) for layer, unit in pairs]
        unit = unit if len(coded) == len(pairs) else torch.cat([u for _, u in coded])
        joined = bias_codes(torch.cat([x.bias for x, _ in coded]), unit)
        parts = dict(zip((x for x, _ in coded), joined.split([len(u) for _, u in coded]), strict=True))
        return [
            Bias(layer.bias, parts[layer])
            if layer in parts
            else as_deployed(layer.bias, layer.bias_kind, unit)
            for layer, unit in pairs
        ]

    def _learn_sums(self, part: _Part, sums_R2: Array) -> None:
        """Take in the sums of codes of a step before; tell if they grew past what that step relied on."""
        for layer, sums in zip(part.layers, np.split(sums_R2, np.cumsum(part.num_rows[:-1])), strict=True):
            magnitudes = np.abs(sums)
            found = LargestSums(float(magnitudes.max()), float(magnitudes.sum(1).max()))
            known = self._known.get(layer)
            if known is not None and layer.has_outgrown(known, found):
                warnings.warn(
                    f"weights of {self._names[layer]} changed so much in one step that sums of its codes may "
                    "have passed 2^24 and been rounded in that step; they are split from now on",
                    stacklevel=2,
                )
            self._known[layer] = found


def takes_part(layer: Any) -> bool:
    """Whether a layer's weight can be rounded together with others now."""
    return (
        isinstance(layer, QuantizedConvolution)
        and "weight" in layer._parameters  # not computed, as by a parametrization, anew for whoever reads it
        and layer.is_integer
        and layer.weight.dtype == torch.float32
        and all(quantizer.scheme.mode == "static" for quantizer in (_input(layer), _weight_quantizer(layer)))
    )


def _part(layers: list[QuantizedConvolution], first_row: int, device: torch.device) -> _Part:
    places, starts, smallest, largest, divisors, num_rows = [], [0], [], [], [], []
    for layer in layers:
        quantizer, weight = _weight_quantizer(layer), layer.weight
        rows = weight.shape[layer.axes.output]
        places.append(Place.of(weight, layer.axes.output, starts[-1]))
        starts += [starts[-1] + (row + 1) * (weight.numel() // rows) for row in range(rows)]
        smallest += [float(quantizer.format.qmin)] * rows
        largest += [float(quantizer.format.qmax)] * rows
        divisors += [log_range_divisor(weight.numel(), quantizer._amax.numel(), quantizer.format)] * rows
        num_rows.append(rows)
    bounds = (torch.tensor(numbers, device=device) for numbers in (smallest, largest))
    longest = max(b - a for a, b in pairwise(starts))
    rows_of_all = Rows(torch.tensor(starts, device=device), longest, *bounds)
    return _Part(
        layers, places, rows_of_all, torch.tensor(divisors, device=device), num_rows, first_row,
        not all(layer.is_narrow for layer in layers),
    )  # fmt: skip


def _weight_quantizer(layer: QuantizedConvolution) -> Quantizer:
    return cast(Quantizer, layer._weight_quantizer)


def _input(layer: QuantizedConvolution) -> Quantizer:
    return cast(Quantizer, layer._input_quantizer)
