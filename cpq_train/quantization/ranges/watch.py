"""What quantizers see in a forward pass, beside their ranges: a few numbers each, gathered on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpq_train.quantization.calibrators.weight_ranges import largest_magnitude
from cpq_train.quantization.layers import QuantAdd, QuantizedConvolution
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranks import largest_over_ranks, sum_over_ranks
from cpq_train.quantization.switches import quantized_layers, quantizers
from cpq_train.sparse import SparseConvTensor

MAX_SAMPLE = 65536
"""Elements of an input of which it is counted how many are clipped."""


class RangeReading(NamedTuple):
    """One quantizer in one forward pass; NaN where there is no such number.

    The ranges of a weight that is quantized per channel stand for its channels by their geometric mean, so
    that the logarithm of amax / start_amax is the mean over the channels.

    Attributes:
        quantizer: Its name in the state dict, the first one of a quantizer that layers share.
        amax: NaN of a dynamic quantizer.
        start_amax: amax at the start; NaN of a dynamic quantizer.
        live_amax: Largest magnitude of the tensor.
        clipped_share: Share of the tensor's values beyond amax, or negative where the numbers are unsigned;
            of an input from a sample. NaN of a dynamic quantizer.
        sqnr_db: Of a weight: 10 log10(power of the weight / power of its rounding error). NaN of an input.
    """

    quantizer: str
    amax: float
    start_amax: float
    live_amax: float
    clipped_share: float
    sqnr_db: float

    @property
    def drift(self) -> float:
        """log2(amax / start_amax): 1 is twice as wide, -1 half; NaN where either is 0 or not known."""
        return math.log2(self.amax / self.start_amax) if self.amax > 0 and self.start_amax > 0 else math.nan


class RangeWatch:
    """Watches one forward pass from its creation to `finish`; gradients and outputs are what they were.

    Nothing is read from the device before `readings`.

    Args:
        network: Float layers and quantizers that are switched off are left out.
        start: Quantizer -> its amax at the start, on the device; of the static ones.
    """

    def __init__(self, network: nn.Module, start: Mapping[str, Tensor]) -> None:
        self._network, self._start = network, start
        self._device = next(network.parameters()).device
        self._quantizers = {name: q for name, q in quantizers(network).items() if q.is_active}
        self._seen: dict[Quantizer, list[_Seen]] = {q: [] for q in self._quantizers.values()}
        self._latest: dict[Quantizer, Tensor] = {}
        self._handles = [m.register_forward_pre_hook(self._hook) for m in quantized_layers(network).values()]
        self._numbers: tuple[Tensor, Tensor] | None = None

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._latest.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Close, and look at weights and ranges while they are those of the forward pass."""
        self.close()
        layers = quantized_layers(self._network).values()
        for layer in (m for m in layers if isinstance(m, QuantizedConvolution)):
            quantizer = layer._weight_quantizer
            if quantizer is not None and quantizer in self._seen:
                self._seen[quantizer].append(_weight_seen(quantizer, layer.weight.detach()))
        values = [self._values(name, quantizer) for name, quantizer in self._quantizers.items()]
        clipped = [
            sum((s.num_clipped for s in seen), torch.zeros((), dtype=torch.int64, device=self._device))
            for seen in self._seen.values()
        ]
        nums = torch.tensor([sum(s.num for s in seen) for seen in self._seen.values()], device=self._device)
        if values:
            self._numbers = torch.stack(values), torch.stack([torch.stack(clipped), nums], 1)

    def readings(self) -> list[RangeReading]:
        """What all ranks saw; every rank must call this, after `finish`."""
        if self._numbers is None:
            return []
        values, counts = self._numbers
        values, counts = largest_over_ranks(values), sum_over_ranks(counts)
        table: list[list[float]] = torch.cat([values, counts.double()], 1).tolist()
        return [_reading(name, *row) for name, row in zip(self._quantizers, table, strict=True)]

    @torch.no_grad()
    def _hook(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        for quantizer, x in _inputs(layer, arguments):
            if quantizer not in self._seen or not x.numel() or self._latest.get(quantizer) is x:
                continue
            self._seen[quantizer].append(_input_seen(quantizer, x.detach()))
            if quantizer.is_shared:
                self._latest[quantizer] = x

    def _values(self, name: str, quantizer: Quantizer) -> Tensor:
        """amax, start_amax, live_amax, sqnr_db; (4,) fp64. live_amax is 0 where nothing was seen."""
        seen = self._seen[quantizer]
        nan, zero = torch.full((), torch.nan, device=self._device), torch.zeros((), device=self._device)
        live = torch.stack([s.live for s in seen]).amax(0).float() if seen else zero
        if quantizer.amax is None:
            amax, start, has_range = nan, nan, live > 0
        else:
            amax, start = quantizer.amax, self._start[name]
            has_range = (amax > 0) & (start > 0)
        means = [
            _mean_of_channels(amax, has_range),
            _mean_of_channels(start, has_range),
            _mean_of_channels(live, has_range & (live > 0)),
        ]
        sqnr_db = seen[0].sqnr_db if seen else nan
        return torch.stack([*means, sqnr_db.double()])


class _Seen(NamedTuple):
    """One tensor: its largest magnitude, of the shape of amax; clipped and counted elements; SQNR."""

    live: Tensor
    num_clipped: Tensor
    num: int
    sqnr_db: Tensor


def _inputs(layer: nn.Module, arguments: tuple[Any, ...]) -> Iterator[tuple[Quantizer | None, Tensor]]:
    """The tensors that a layer rounds, each with its quantizer."""
    if isinstance(layer, QuantAdd):
        branch, identity = arguments
        yield layer._input_quantizer, branch
        yield layer._residual_quantizer or layer._input_quantizer, identity
    else:
        assert isinstance(layer, QuantizedConvolution)
        (x,) = arguments
        yield layer._input_quantizer, x.features if isinstance(x, SparseConvTensor) else x


def _input_seen(quantizer: Quantizer, x: Tensor) -> _Seen:
    # In whatever order the elements lie in memory, so that nothing is copied.
    in_a_row = x.is_contiguous(memory_format=torch.channels_last)
    flat = x.as_strided((x.numel(),), (1,)) if in_a_row else x.reshape(-1)
    low, high = flat.aminmax()
    sample = flat[:: stride_for(len(flat))]
    clipped, no_sqnr = _num_clipped(quantizer, sample), x.new_full((), torch.nan)
    return _Seen(torch.maximum(-low, high), clipped, len(sample), no_sqnr)


def _weight_seen(quantizer: Quantizer, weight: Tensor) -> _Seen:
    axis = None if quantizer._axis is None else quantizer._axis[0]
    signal, noise = weight.double().square().sum(), (quantizer(weight) - weight).double().square().sum()
    clipped = _num_clipped(quantizer, weight)
    return _Seen(largest_magnitude(weight, axis), clipped, weight.numel(), 10 * (signal / noise).log10())


def _num_clipped(quantizer: Quantizer, x: Tensor) -> Tensor:
    if quantizer.scheme.mode != "static":
        return torch.zeros((), dtype=torch.int64, device=x.device)
    limit = quantizer.range_of(x).limit
    is_clipped = x.abs() > limit
    return (is_clipped if quantizer.scheme.signed else is_clipped | (x < 0)).sum()


def stride_for(num: int) -> int:
    """The smallest stride that leaves at most `MAX_SAMPLE` of `num` elements and has no divisor with it.

    Such a sample meets every channel, row and column alike, however the tensor is laid out.
    """
    stride = -(-num // MAX_SAMPLE)
    while math.gcd(stride, num) > 1:
        stride += 1
    return stride


def _mean_of_channels(values: Tensor, is_counted: Tensor) -> Tensor:
    """Geometric mean, in fp64; a single value is itself."""
    if values.dim() == 0:
        return values.double()
    logs = torch.where(is_counted, values, 1.0).double().log()
    return (logs.sum() / is_counted.sum()).exp()


def _reading(
    name: str, amax: float, start: float, live: float, sqnr_db: float, num_clipped: float, num: float
) -> RangeReading:
    is_static = not math.isnan(amax)
    share = num_clipped / num if num and is_static else math.nan
    return RangeReading(name, amax, start, live if num else math.nan, share, sqnr_db)
