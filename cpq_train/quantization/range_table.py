"""The static ranges of a network's quantizers, worked out together: few operations whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.numerics import fake_quant
from cpq_train.quantization.quantizer import Quantizer


@dataclass(frozen=True)
class Flat:
    """Numbers of all ranges, one behind the other."""

    amax: Tensor
    scale: Tensor
    step: Tensor


class RangeTable:
    """Static quantizers on one device, those of one amax first, and where each has its numbers.

    Args:
        quantizers: Static ones.

    Attributes:
        start_of: Quantizer -> the first of its numbers.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        whole = [q for q in quantizers if q.is_per_tensor]
        self._whole, self._by_channel = whole, [q for q in quantizers if not q.is_per_tensor]
        self.start_of: dict[Quantizer, int] = {}
        end = 0
        for quantizer in self.quantizers:
            self.start_of[quantizer] = end
            end += quantizer._amax.numel()
        device = self.device
        self._qmax = self._by_number([float(q.format.qmax) for q in self.quantizers], device)
        self._step_of_zero = self._by_number([q.step_of_zero for q in self.quantizers], device)
        self._key = [(q.format.qmax, q.step_of_zero) for q in self.quantizers]

    @property
    def quantizers(self) -> list[Quantizer]:
        """In the order of the table."""
        return [*self._whole, *self._by_channel]

    @property
    def device(self) -> torch.device:
        """Where the ranges are."""
        return cast(torch.device, self.quantizers[0]._amax.device)

    def is_of(self, quantizers: Sequence[Quantizer]) -> bool:
        """Whether it is what a table of these would be now."""
        return (
            set(quantizers) == self.start_of.keys()
            and self._qmax.device == self.device
            and self._key == [(q.format.qmax, q.step_of_zero) for q in self.quantizers]
        )

    def work_out(self) -> Flat:
        """Work the ranges out, and let the quantizers' scope know them."""
        learned = [q._log_amax for q in self.quantizers if q._log_amax is not None]
        if len(learned) == len(self.quantizers):
            amax = _joined(learned).exp()
        else:
            amax = _joined([q._amax if q._log_amax is None else q._log_amax.exp() for q in self.quantizers])
        scale = fake_quant.scales_of(amax, self._qmax)
        flat = Flat(amax, scale, fake_quant.steps_of(amax, self._qmax, self._step_of_zero))
        self._let_know(flat)
        return flat

    def _let_know(self, flat: Flat) -> None:
        tensors = (flat.amax, flat.scale, flat.step)
        num_whole = len(self._whole)
        of_whole = zip(*(tensor[:num_whole].unbind() for tensor in tensors), strict=True)
        is_at_hand = are_numbers_at_hand(flat.amax.device)
        windows = flat.amax[:num_whole].tolist() if is_at_hand else [None] * num_whole
        for quantizer, found, window in zip(self._whole, of_whole, windows, strict=True):
            amax, scale, step = found
            quantizer.scope.ranges[quantizer] = quantizer.as_range(amax, scale, step, window)
        sizes = [q._amax.numel() for q in self._by_channel]
        of_channels = zip(*(tensor[num_whole:].split(sizes) for tensor in tensors), strict=True)
        for quantizer, found in zip(self._by_channel, of_channels, strict=True):
            quantizer.scope.ranges[quantizer] = quantizer.as_range(*found)

    def _by_number(self, by_quantizer: list[float], device: torch.device) -> Tensor:
        repeats = torch.tensor([q._amax.numel() for q in self.quantizers])
        return torch.tensor(by_quantizer).repeat_interleave(repeats).to(device)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
