"""What the operators compute, by PyTorch's own: the oracle of the kernels, and what runs where they cannot.

Tensors are fp32. A per-tensor scale, step or amax has no axis. `smallest` and `largest` are codes.

Letters: N numbers, R rows.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from cpq_train.quantization.numerics.masks import INSIDE, POSITIVE

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
"""No two fp32 amax and |x| above 2^-100 differ by less."""


def encode(x: Tensor, scale: Tensor, smallest: float, largest: float) -> Tensor:
    """Codes."""
    return torch.mul(x, scale).round_().clamp_(smallest, largest)


def rectify(
    x: Tensor, scale: Tensor, amax: Tensor, largest: float, has_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(x), its codes, and the mask of its gradient, see `masks`; an empty one where there is none."""
    values = torch.relu(x)
    mask = _mask(~(x <= 0), POSITIVE) | _mask(~(x > amax), INSIDE) if has_gradient else _nothing(x)
    return values, encode(values, scale, 0.0, largest), mask


def pass_masked(grad: Tensor, mask: Tensor, bits: int) -> Tensor:
    """The gradient where a mask has all of the bits, 0 elsewhere."""
    return torch.where(mask & bits == bits, grad, 0.0)


def pass_inside(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    """The gradient where |x| <= amax, 0 elsewhere."""
    # By the sign of a difference: comparing, and choosing by a mask, are far slower on a CPU.
    return cast(Tensor, torch.ops.aten.threshold_backward(grad, amax - x.abs(), -SMALLEST_NORMAL))


def learn(
    grad: Tensor, x: Tensor, scale: Tensor, step: Tensor, amax: Tensor, smallest: float, largest: float,
    divisor: float, is_rectified: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pass_inside`, and `fake_quant.log_range_gradient`, whose sum is divided by `divisor`.

    If x is what a ReLU gave, the gradient is passed on through it.
    """
    error = encode(x, scale, smallest, largest).mul_(step).sub_(pass_inside(x, x, amax)).mul_(grad)
    passed = pass_inside(grad, x, amax)
    return torch.ops.aten.threshold_backward(passed, x, 0) if is_rectified else passed, error.sum() / divisor


def add_rounded(
    a: Tensor, scale: Tensor, step: Tensor, amax: Tensor, smallest: float, largest: float,
    codes_b: Tensor, step_b: Tensor, has_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`code(a) * step + codes_b * step_b`, and the mask of a's gradient."""
    y = encode(a, scale, smallest, largest).mul_(step).add_(codes_b * step_b)
    return y, _mask(~(a.abs() > amax), INSIDE) if has_gradient else _nothing(a)


def scale_rows_(sums: Tensor, unit: Tensor, before: Tensor | None, behind: Tensor | None, axis: int) -> None:
    """`(sums + before) * unit + behind` by channel, which `axis` has, in place; a rounding each."""
    shape = [1] * sums.dim()
    shape[axis] = -1
    if before is not None:
        sums.add_(before.view(shape))
    sums.mul_(unit.view(shape))
    if behind is not None:
        sums.add_(behind.view(shape))


def round_rows(
    flat: Tensor, starts: Tensor, longest: int, scale: Tensor, step: Tensor, smallest: Tensor,
    largest: Tensor, has_values: bool, has_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes (N,) of rows that lie one behind the other, their values, and the sums of codes by sign.

    Args:
        flat: (N,).
        starts: First number of each row, and N; (R + 1,) int64.
        longest: Length of the longest row.
        scale: (R,), as the three behind it.
        step: Value of code 1.
        smallest: Code.
        largest: Code.
        has_values: Else the second result is empty.
        has_sums: Else the third one is, which is (R, 2): sums of positive codes, and of negative ones.
    """
    row_N = _row_of_each(starts, len(flat))
    codes = torch.mul(flat, scale[row_N]).round_()
    codes = torch.clamp(codes, smallest[row_N], largest[row_N])
    values = codes * step[row_N] if has_values else _nothing(flat)
    if not has_sums:
        return codes, values, _nothing(flat)
    sums = flat.new_zeros((len(scale), 2))
    return codes, values, sums.index_add_(0, row_N, torch.stack([codes.clamp(min=0), codes.clamp(max=0)], 1))


def pass_rows(
    grad: Tensor, flat: Tensor, starts: Tensor, longest: int, factor: Tensor, amax: Tensor
) -> Tensor:
    """`grad * factor` where |x| <= amax, 0 elsewhere; factor and amax by row."""
    row_N = _row_of_each(starts, len(flat))
    return pass_inside(grad * factor[row_N], flat, amax[row_N])


def learn_rows(
    grad: Tensor, flat: Tensor, starts: Tensor, longest: int, factor: Tensor, amax: Tensor, scale: Tensor,
    step: Tensor, smallest: Tensor, largest: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pass_rows`, and by row the sum of the gradients of the step times the step, (R,)."""
    row_N = _row_of_each(starts, len(flat))
    grad = grad * factor[row_N]
    codes = torch.clamp(torch.mul(flat, scale[row_N]).round_(), smallest[row_N], largest[row_N])
    inside = pass_inside(flat, flat, amax[row_N])
    error = codes.mul_(step[row_N]).sub_(inside).mul_(grad)
    sums = torch.zeros_like(scale).index_add_(0, row_N, error)
    return pass_inside(grad, flat, amax[row_N]), sums


def _row_of_each(starts: Tensor, length: int) -> Tensor:
    return torch.repeat_interleave(starts.diff(), output_size=length)


def _mask(is_set: Tensor, bit: np.uint8) -> Tensor:
    return is_set.to(torch.uint8).mul_(int(bit))


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)
