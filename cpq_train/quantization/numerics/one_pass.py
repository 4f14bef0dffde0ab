"""Rounding of tensors in one pass each, where they are fit for it.

Fit are fp32 tensors whose numbers lie in memory without gaps, in whatever order of axes: on the CPU they are
passed over by `loops.py`, on a GPU by the kernels of `device/`. Everything here gives the bits that PyTorch's
own passes give, which compute what is not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand, are_on
from cpq_train.common.threads import share_out
from cpq_train.quantization.numerics.device import eager
from cpq_train.quantization.numerics.device.operators import operators
from cpq_train.quantization.numerics.formats import IntegerFormat, NumberFormat, log_range_divisor

Array: TypeAlias = NDArray[Any]

SMALLEST_PART = 2**16
"""Numbers below which an array is not shared out over threads."""


class Scalars(NamedTuple):
    """A static range of one tensor.

    Attributes:
        scale: Codes per unit, one number as the two behind it.
        step: Value of code 1.
        amax: Largest magnitude inside.
        fmt: The integers in use.
        log_amax: What amax follows from, where it is learned, which loops do not do.
    """

    scale: Tensor
    step: Tensor
    amax: Tensor
    fmt: IntegerFormat
    log_amax: Tensor | None = None

    @property
    def on_host(self) -> tuple[np.float32, ...]:
        """All five numbers."""
        numbers = (self.scale.item(), self.step.item(), self.amax.item(), self.fmt.qmin, self.fmt.qmax)
        return tuple(map(np.float32, numbers))

    @property
    def on_device(self) -> tuple[Any, ...]:
        """The same, those that a device computed where they are."""
        return self.scale, self.step, self.amax, float(self.fmt.qmin), float(self.fmt.qmax)


def is_fit(*tensors: Tensor) -> bool:
    """Whether tensors can be passed over here: all of one shape, and in one order of memory."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and all(t.device == first.device and t.dtype == torch.float32 and t.numel() for t in tensors)
        and (are_operators_for(first) or (first.device.type == "cpu" and are_on()))
        and all(t.shape == first.shape and t.stride() == first.stride() for t in tensors[1:])
        and has_no_gaps(first)
    )


def are_operators_for(tensor: Tensor) -> bool:
    """Whether the kernels of a GPU pass over a tensor that is fit."""
    return tensor.device.type in ("cpu", "cuda") and not are_numbers_at_hand(tensor.device)


def has_byte_codes(fmt: NumberFormat) -> bool:
    """Whether codes that are not negative fit into a byte."""
    return isinstance(fmt, IntegerFormat) and fmt.qmax <= 255


def encoded(x: Tensor, scale: Tensor, fmt: IntegerFormat) -> Tensor | None:
    """u8 codes of a tensor that is fit for loops; None if one would be negative, or is no number."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    numbers = np.float32(scale.item()), np.float32(fmt.qmax)
    is_whole = _each(lambda x, codes: _loops().encode(x, *numbers, codes), x, codes)
    return codes if is_whole else None


class Rectified(NamedTuple):
    """What `rectified` makes of a tensor.

    Attributes:
        values: relu(x).
        codes: Their codes, u8, or fp32 on a GPU, whose convolutions take these.
        mask: Which gradients come back, see `masks`; None where none will.
    """

    values: Tensor
    codes: Tensor
    mask: Tensor | None


def rectified(x: Tensor, by: Scalars, has_mask: bool) -> Rectified | None:
    """ReLU and codes of a tensor that is fit; None if one of its elements is NaN, which a byte cannot be."""
    if are_operators_for(x):
        scale, _, amax, _, largest = by.on_device
        values, codes, mask = operators.rectify(x, scale, amax, largest, has_mask)
        return Rectified(values, codes, mask if has_mask else None)
    values, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    mask = torch.empty_like(codes) if has_mask else None
    scale, _, amax, _, largest = by.on_host
    is_whole = _each(
        lambda x, y, codes, mask: _loops().encode_relu(x, scale, largest, amax, y, codes, mask),
        *(x, values, codes, mask),
    )
    return Rectified(values, codes, mask) if is_whole else None


def learned(grad: Tensor, x: Tensor, by: Scalars, is_rectified: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of log(amax) from that of its values; see `device.eager.learn`."""
    if grad.stride() != x.stride() or grad.dtype != torch.float32:
        grad = torch.empty_like(x).copy_(grad)
    divisor = log_range_divisor(x.numel(), 1, by.fmt)
    passed, of_log = operators.learn(grad, x, *by.on_device, divisor, is_rectified)
    return passed, of_log.view_as(by.amax)


def passed(grad: Tensor, mask: Tensor, bits: np.uint8) -> Tensor:
    """The gradient where a mask has all of the bits, 0 elsewhere."""
    if grad.stride() != mask.stride() or grad.dtype != torch.float32:
        grad = torch.empty_like(mask, dtype=torch.float32).copy_(grad)
    if are_operators_for(grad):
        return cast(Tensor, operators.pass_masked(grad, mask, int(bits)))
    out = torch.empty_like(grad)
    _each(lambda grad, mask, out: _loops().pass_masked(grad, mask, bits, out), grad, mask, out)
    return out


def added(
    a: Tensor, by_a: Scalars, codes_b: Tensor, step_b: Tensor, has_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`code(a) * step_a + codes_b * step_b`, and the mask of a's gradient; a is fit, the codes lie alike."""
    if are_operators_for(a):
        y, mask = operators.add_rounded(a, *by_a.on_device, codes_b, step_b, has_gradient)
        return y, mask if has_gradient else None
    y = torch.empty_like(a)
    mask = torch.empty_like(a, dtype=torch.uint8) if has_gradient else None
    scale, step, amax, smallest, largest = by_a.on_host
    by_b = np.float32(step_b.item())
    _each(
        lambda a, b, y, mask: _loops().add_rounded(a, scale, step, smallest, largest, amax, b, by_b, y, mask),
        *(a, codes_b, y, mask),
    )
    return y, mask


def scale_(
    sums: Tensor, unit: Tensor, bias: Tensor | None, feature_axis: int, bias_codes: Tensor | None = None
) -> Tensor:
    """`(sums + bias_codes) * unit + bias` by channel, in place, with a rounding each."""
    is_one_pass = is_fit(sums)
    if is_one_pass and are_operators_for(sums):
        operators.scale_rows_(sums, unit, bias_codes, bias, feature_axis)
        return sums
    rows = sums.movedim(feature_axis, -1)
    if not is_one_pass or not rows.is_contiguous() or bias_codes is not None:
        eager.scale_rows_(sums, unit, bias_codes, bias, feature_axis)
        return sums
    num_channels = rows.shape[-1]
    by_channel = [_numbers(unit.expand(num_channels)), _numbers(bias)]
    matrix = rows.view(-1, num_channels).numpy()
    in_parts(lambda a, b: _loops().scale_rows(matrix[a:b], *by_channel), len(matrix), num_channels)
    return sums


def rounded(sums: Tensor, bias_codes: Tensor | None) -> Tensor:
    """int32 sums (V, C') and their bias codes (C',), rounded to fp32 once."""
    out = torch.empty_like(sums, dtype=torch.float32)
    codes = np.empty(0, np.int64) if bias_codes is None else bias_codes.detach().long().numpy()
    given, made = sums.numpy(), out.numpy()
    in_parts(lambda a, b: _loops().round_sums(given[a:b], codes, made[a:b]), len(given), given.shape[1])
    return out


def _loops() -> ModuleType:
    from cpq_train.quantization.numerics import loops  # Numba, whose import takes a second

    return loops


def _numbers(tensor: Tensor | None) -> Array:
    return np.empty(0, np.float32) if tensor is None else tensor.detach().contiguous().numpy()


def _each(loop: Callable[..., int | None], *tensors: Tensor | None) -> bool:
    """Runs a loop over the numbers of tensors that lie alike; whether no part of it returned a flag."""
    arrays = [flat(tensor) for tensor in tensors]
    flags: list[int | None] = []
    in_parts(lambda a, b: flags.append(loop(*(array[a:b] for array in arrays))), len(arrays[0]))
    return not any(flags)


def in_parts(work: Callable[[int, int], None], length: int, num_each: int = 1) -> None:
    """As `share_out`, of numbers or of rows of `num_each`; few are not shared out."""
    if length * num_each < SMALLEST_PART:
        work(0, length)
    else:
        share_out(work, length)


def flat(tensor: Tensor | None) -> Array:
    """The numbers of a tensor that is fit, as they lie in memory; None has none."""
    if tensor is None:
        return np.empty(0, np.uint8)
    ordered = in_memory_order(tensor.detach())
    assert ordered is not None
    array: Array = ordered.view(-1).numpy()
    return array


def has_no_gaps(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie one behind the other, in whatever order of axes."""
    if tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return True
    return in_memory_order(tensor) is not None


def in_memory_order(tensor: Tensor) -> Tensor | None:
    """A view whose axes are in the order in which its numbers lie; None if there are gaps between them."""
    if tensor.is_contiguous():
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    return ordered if ordered.is_contiguous() else None
