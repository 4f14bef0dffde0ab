"""Fake quantization: the formula, once.

    code  = clamp(round_half_even(x * (qmax / amax)), qmin, qmax)
    value = code / (qmax / amax)

Values and gradients equal pytorch-quantization 2.1.3's `fake_tensor_quant` bit for bit, without its host
synchronisations: a negative input to an unsigned quantizer saturates at 0 instead of raising, and an amax
that is not positive is found by `calibration.check_ranges`, not here. amax <= 2^-24 gives codes 0 and the
scale 1, as there.

The straight-through gradient passes where |x| <= amax. Backward needs only the input, so nothing else is
saved.

A quantized layer works on the codes and scales its sum afterwards (`layers/`); the gradient of a code is
then, by convention, the gradient of the *value* it stands for. That spares a pass over every activation.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from cpq_train.quantization.numerics import one_pass
from cpq_train.quantization.numerics.device import eager
from cpq_train.quantization.numerics.device.operators import operators
from cpq_train.quantization.numerics.formats import IntegerFormat, NumberFormat, log_range_divisor
from cpq_train.quantization.numerics.rows import RowRanges, learn_weight

SMALLEST_AMAX = 2.0**-24
"""At or below it everything is quantized to 0 (the smallest positive fp16 number, pytorch-quantization's
limit)."""


def scale_of(amax: Tensor, fmt: NumberFormat) -> Tensor:
    """The scale `qmax / amax` in fp32; 0 where amax <= 2^-24, which makes every code 0."""
    amax = amax.float()
    # Divided as tensors: with a Python number torch multiplies by a reciprocal, which rounds twice.
    return scales_of(amax, torch.full_like(amax, fmt.qmax))


def step_of(amax: Tensor, fmt: NumberFormat, of_zero: float = 1.0) -> Tensor:
    """The value of code 1, `amax / qmax` in fp32.

    Args:
        amax: Any shape.
        fmt: The numbers in use.
        of_zero: The value where amax <= 2^-24, whose codes are all 0.
    """
    amax = amax.float()
    return steps_of(amax, torch.full_like(amax, fmt.qmax), torch.full_like(amax, of_zero))


def scales_of(amax: Tensor, qmax: Tensor) -> Tensor:
    """`scale_of` of fp32 ranges of several formats."""
    return (qmax / amax).masked_fill_(amax <= SMALLEST_AMAX, 0.0)


def steps_of(amax: Tensor, qmax: Tensor, of_zero: Tensor) -> Tensor:
    """`step_of` of fp32 ranges of several formats."""
    return torch.where(amax <= SMALLEST_AMAX, of_zero, amax / qmax)


def full_precision(x: Tensor) -> Tensor:
    """fp16 and bf16, which autocast makes, in fp32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def round_to_codes(x: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """The numbers of the format nearest to x * scale, without a gradient of their own."""
    return fmt.round_(torch.mul(x, scale))


def pass_inside(grad: Tensor, x: Tensor, amax: Tensor | float) -> Tensor:
    """The gradient where |x| <= amax, 0 elsewhere; quicker with amax as a Python number."""
    if isinstance(amax, float):
        # One fused pass. hardtanh's bounds are exclusive, ours are not: hence the next number up.
        limit = math.nextafter(amax, math.inf) if x.dtype == torch.float64 else _next_float32(amax)
        return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, x, -limit, limit))
    return eager.pass_inside(grad, x, amax)


def log_range_gradient(
    grad: Tensor, x: Tensor, codes: Tensor, amax: Tensor, step: Tensor, fmt: NumberFormat
) -> Tensor:
    """Gradient of log(amax): LSQ's gradient of the step (Esser et al. 2020, equations 3 and 4).

    With v the value of a code, dv/d(step) is (v - x) / step where x is inside the range and v / step where it
    is clipped; a step is amax / qmax, so that d v / d log(amax) is v - x, or v. The published gradient scale
    1 / sqrt(N * qmax), N being the numbers that share an amax, keeps updates of ranges and weights in
    proportion.

    Args:
        grad: Gradient of the values.
        x: What was rounded.
        codes: Its codes; overwritten.
        amax: Broadcastable to `x`.
        step: Value of code 1, the shape of `amax`.
        fmt: The numbers in use.

    Returns:
        The shape of `amax`.
    """
    error = codes.mul_(step).sub_(pass_inside(x, x, amax)).mul_(grad)
    return error.sum_to_size(amax.shape) / log_range_divisor(x.numel(), amax.numel(), fmt)


def _next_float32(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(math.inf)))


class _How(NamedTuple):
    """What the functions below need beside tensors that autograd must know of."""

    fmt: NumberFormat
    window: float | None
    grad_factor: Tensor | None = None
    step: Tensor | None = None
    row_axis: int | None = None


class _FakeQuantize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_amax: Tensor | None, amax: Tensor, scale: Tensor, how: _How
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, amax, scale)
        return round_to_codes(x, scale, how.fmt).div_(torch.where(scale == 0, 1.0, scale))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_value_gradients(ctx, grad), None, None, None


class _Codes(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_amax: Tensor | None, amax: Tensor, scale: Tensor, how: _How
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, amax, scale)
        return round_to_codes(x, scale, how.fmt)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.how.grad_factor is not None:
            grad = grad * ctx.how.grad_factor
        return *_value_gradients(ctx, grad), None, None, None


class _Source(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_amax: Tensor | None, amax: Tensor, scale: Tensor, how: _How
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, amax, scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_value_gradients(ctx, grad), None, None, None


def _value_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of log(amax), from that of the values."""
    x, amax, scale = ctx.saved_tensors
    how: _How = ctx.how
    step = None
    if ctx.needs_input_grad[1]:
        step = step_of(amax, how.fmt) if how.step is None else how.step
    is_plain = amax.numel() == 1 and isinstance(how.fmt, IntegerFormat)
    is_for_operators = one_pass.are_operators_for(x) and not torch.is_grad_enabled()  # they have no gradient
    if is_plain and is_for_operators and one_pass.is_fit(x, grad):
        if step is None:
            return operators.pass_inside(grad, x, amax), None
        by = one_pass.Scalars(scale, step, amax, cast(IntegerFormat, how.fmt))
        return one_pass.learned(grad, x, by, is_rectified=False)
    if step is not None and how.row_axis is not None and not is_compiling():
        return learn_weight(grad, x, how.row_axis, cast(IntegerFormat, how.fmt), RowRanges(amax, scale, step))
    grad_log = None
    if step is not None:
        grad_log = log_range_gradient(grad, x, round_to_codes(x, scale, how.fmt), amax, step, how.fmt)
    return pass_inside(grad, x, amax if how.window is None else how.window), grad_log


def fake_quantize(
    x: Tensor,
    amax: Tensor,
    fmt: NumberFormat,
    window: float | None = None,
    scale: Tensor | None = None,
    log_amax: Tensor | None = None,
) -> Tensor:
    """Round to the representable values.

    Args:
        x: Any shape; fp16 and bf16 are computed, and returned, in fp32.
        amax: Broadcastable to `x`, >= 0.
        fmt: The numbers to use.
        window: `amax` as a Python number where the caller has it at hand (per-tensor amax): saves two passes
            in backward.
        scale: `scale_of(amax, fmt)` where the caller has it at hand.
        log_amax: The logarithm of `amax` where it is learned; it gets `log_range_gradient`.

    Returns:
        `code / scale`, the shape of `x`.
    """
    scale = scale_of(amax, fmt) if scale is None else scale
    return cast(Tensor, _FakeQuantize.apply(full_precision(x), log_amax, amax, scale, _How(fmt, window)))


def codes(
    x: Tensor,
    amax: Tensor,
    fmt: NumberFormat,
    window: float | None = None,
    grad_factor: Tensor | None = None,
    scale: Tensor | None = None,
    log_amax: Tensor | None = None,
    row_axis: int | None = None,
) -> Tensor:
    """Integer codes, held in fp32.

    Args:
        x: Any shape; fp16 and bf16 are rounded as fp32.
        amax: Broadcastable to `x`, >= 0.
        fmt: The integers to use.
        window: See `fake_quantize`.
        grad_factor: Multiplies the incoming gradient (broadcastable to `x`).
        scale: See `fake_quantize`.
        log_amax: See `fake_quantize`.
        row_axis: Of a weight's output channels: sums for `log_amax` are then taken as `rows.py` takes them.

    Returns:
        Whole numbers in [qmin, qmax], the shape of `x`. Their gradient is that of the value they stand for.
    """
    scale = scale_of(amax, fmt) if scale is None else scale
    return cast(
        Tensor,
        _Codes.apply(
            full_precision(x), log_amax, amax, scale, _How(fmt, window, grad_factor, row_axis=row_axis)
        ),
    )


def source_of(
    x: Tensor,
    amax: Tensor,
    fmt: NumberFormat,
    window: float | None,
    scale: Tensor,
    step: Tensor,
    log_amax: Tensor | None = None,
) -> Tensor:
    """The tensor itself, which passes the gradient of its rounded values on to it.

    Arguments are those of `fake_quantize`, and the value of code 1; x is fp32.
    """
    return cast(Tensor, _Source.apply(x, log_amax, amax, scale, _How(fmt, window, step=step)))


class _AddCodes(Function):
    @staticmethod
    def forward(ctx: Any, codes_a: Tensor, step_a: Tensor, codes_b: Tensor, step_b: Tensor) -> Tensor:
        a, b = codes_a * step_a, codes_b * step_b
        return a.add_(b) if a.shape == b.shape else a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        return grad, None, grad, None  # autograd sums it over what was broadcast


def add_codes(codes_a: Tensor, step_a: Tensor, codes_b: Tensor, step_b: Tensor) -> Tensor:
    """`codes_a * step_a + codes_b * step_b`, broadcast; the gradient of a value is that of its sums."""
    return cast(Tensor, _AddCodes.apply(codes_a, step_a, codes_b, step_b))
