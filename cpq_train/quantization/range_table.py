"""The static ranges of a network's quantizers, worked out together: few operations whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.numerics import fake_quant
from cpq_train.quantization.quantizer import Quantizer, Range


class Flat:
    """Numbers of all ranges, one behind the other.

    Attributes:
        amax: Of all quantizers, those of one amax first.
        scale: Likewise.
        step: Likewise.
    """

    def __init__(self, amax: Tensor, scale: Tensor, step: Tensor, table: RangeTable) -> None:
        self.amax, self.scale, self.step = amax, scale, step
        self._start_of, num_whole = table.start_of, table.num_whole
        self._of_whole = [tensor[:num_whole].unbind() for tensor in (amax, scale, step)]
        self._windows: list[float] | None = None
        if are_numbers_at_hand(amax.device):
            self._windows = amax[:num_whole].tolist()

    def range_of(self, quantizer: Quantizer) -> Range | None:
        """Of a quantizer; None where the table has it not."""
        start = self._start_of.get(quantizer)
        if start is None:
            return None
        if quantizer.is_per_tensor:
            amax, scale, step = (of_whole[start] for of_whole in self._of_whole)
            is_learned = quantizer._log_amax is not None
            window = None if self._windows is None or is_learned else self._windows[start]
            return Range(amax, scale, step, window, quantizer._log_amax)
        shape, span = quantizer._amax.shape, slice(start, start + quantizer._amax.numel())
        amax, scale, step = (t[span].view(shape) for t in (self.amax, self.scale, self.step))
        return Range(amax, scale, step, None, quantizer._log_amax)


class RangeTable:
    """Static quantizers on one device, those of one amax first, and where each has its numbers.

    Args:
        quantizers: Static ones.

    Attributes:
        quantizers: In the order of the table.
        start_of: Quantizer -> the first of its numbers.
        num_whole: Quantizers of one amax.
    """

    def __init__(self, quantizers: Sequence[Quantizer]) -> None:
        whole = [q for q in quantizers if q.is_per_tensor]
        self.num_whole = len(whole)
        self.quantizers = [*whole, *(q for q in quantizers if not q.is_per_tensor)]
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
        """The ranges as they are now."""
        learned = [q._log_amax for q in self.quantizers if q._log_amax is not None]
        if len(learned) == len(self.quantizers):
            amax = _joined(learned).exp()
        else:
            amax = _joined([q._amax if q._log_amax is None else q._log_amax.exp() for q in self.quantizers])
        scale = fake_quant.scales_of(amax, self._qmax)
        return Flat(amax, scale, fake_quant.steps_of(amax, self._qmax, self._step_of_zero), self)

    def _by_number(self, by_quantizer: list[float], device: torch.device) -> Tensor:
        pairs = zip(self.quantizers, by_quantizer, strict=True)
        return torch.tensor([number for q, number in pairs for _ in range(q._amax.numel())], device=device)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
