"""The operators of `eager.py` as Triton kernels, one launch each.

Numbers are taken as they lie in memory, so that tensors of one launch lie alike. Products and sums that
follow each other are not fused (`enable_fp_fusion`), because that would leave out a rounding.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpq_train.quantization.numerics import masks

BLOCK = 1024
ROW_BLOCK = 1024

POSITIVE = tl.constexpr(int(masks.POSITIVE))
INSIDE = tl.constexpr(int(masks.INSIDE))
# Added to a number below 2^22 and taken away again, it leaves the nearest whole one, ties to even.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _round(x, scale, smallest, largest):
    # Bounded first, which comes to the same, so that the addend can round.
    bounded = tl.minimum(tl.maximum(x * scale, smallest, NAN), largest, NAN)
    return (bounded + ROUNDING) - ROUNDING


@triton.jit
def _encode(x, scale, codes, smallest, largest, length, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    tl.store(codes + i, _round(tl.load(x + i, is_there), tl.load(scale), smallest, largest), is_there)


@triton.jit
def _rectify(
    x, scale, amax, values, codes, mask, largest, length, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    given = tl.load(x + i, is_there)
    value = tl.maximum(given, 0.0, NAN)
    tl.store(values + i, value, is_there)
    tl.store(codes + i, _round(value, tl.load(scale), 0.0, largest), is_there)
    if HAS_MASK:
        positive = tl.where(given <= 0, 0, POSITIVE)
        inside = tl.where(given > tl.load(amax), 0, INSIDE)
        tl.store(mask + i, (positive | inside).to(tl.uint8), is_there)


@triton.jit
def _pass_masked(grad, mask, out, bits, length, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    passes = (tl.load(mask + i, is_there).to(tl.int32) & bits) == bits
    tl.store(out + i, tl.where(passes, tl.load(grad + i, is_there), 0.0), is_there)


@triton.jit
def _pass_inside(grad, x, amax, out, length, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    is_outside = tl.abs(tl.load(x + i, is_there)) > tl.load(amax)
    tl.store(out + i, tl.where(is_outside, 0.0, tl.load(grad + i, is_there)), is_there)


@triton.jit
def _learn(
    grad, x, scale, step, amax, out, parts, smallest, largest, length,
    IS_RECTIFIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    given, by = tl.load(x + i, is_there, 0.0), tl.load(grad + i, is_there, 0.0)
    is_outside = tl.abs(given) > tl.load(amax)
    value = _round(given, tl.load(scale), smallest, largest) * tl.load(step)
    error = (value - tl.where(is_outside, 0.0, given)) * by
    if IS_RECTIFIED:
        is_outside = is_outside | (given <= 0)
    tl.store(out + i, tl.where(is_outside, 0.0, by), is_there)
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(is_there, error, 0.0)))


@triton.jit
def _add_rounded(
    a, scale, step, amax, codes_b, step_b, y, mask, smallest, largest, length,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    given = tl.load(a + i, is_there)
    mine = _round(given, tl.load(scale), smallest, largest) * tl.load(step)
    theirs = tl.load(codes_b + i, is_there).to(tl.float32) * tl.load(step_b)
    tl.store(y + i, mine + theirs, is_there)
    if HAS_MASK:
        inside = tl.where(tl.abs(given) > tl.load(amax), 0, INSIDE)
        tl.store(mask + i, inside.to(tl.uint8), is_there)


@triton.jit
def _scale_rows(
    sums, unit, before, behind, length, inner, num_channels, num_units,
    HAS_BEFORE: tl.constexpr, HAS_BEHIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < length
    channel = (i // inner) % num_channels
    y = tl.load(sums + i, is_there)
    if HAS_BEFORE:
        y = y + tl.load(before + channel, is_there)
    y = y * tl.load(unit + channel % num_units, is_there)
    if HAS_BEHIND:
        y = y + tl.load(behind + channel, is_there)
    tl.store(sums + i, y, is_there)


@triton.jit
def _round_rows(
    flat, starts, scale, step, smallest, largest, codes, values, sums,
    HAS_VALUES: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    i = tl.load(starts + row) + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < tl.load(starts + row + 1)
    given = tl.load(flat + i, is_there, 0.0)
    code = _round(given, tl.load(scale + row), tl.load(smallest + row), tl.load(largest + row))
    tl.store(codes + i, code, is_there)
    if HAS_VALUES:
        tl.store(values + i, code * tl.load(step + row), is_there)
    if HAS_SUMS:
        code = tl.where(is_there, code, 0.0)
        # Whole numbers below 2^24: in whatever order they are added.
        tl.atomic_add(sums + 2 * row, tl.sum(tl.maximum(code, 0.0)))
        tl.atomic_add(sums + 2 * row + 1, tl.sum(tl.minimum(code, 0.0)))


@triton.jit
def _pass_rows(grad, flat, starts, factor, amax, out, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.load(starts + row) + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < tl.load(starts + row + 1)
    is_outside = tl.abs(tl.load(flat + i, is_there)) > tl.load(amax + row)
    by = tl.load(grad + i, is_there) * tl.load(factor + row)
    tl.store(out + i, tl.where(is_outside, 0.0, by), is_there)


@triton.jit
def _learn_rows(
    grad, flat, starts, factor, amax, scale, step, smallest, largest, out, parts, BLOCK: tl.constexpr
):
    row, part = tl.program_id(0), tl.program_id(1)
    i = tl.load(starts + row) + part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < tl.load(starts + row + 1)
    given = tl.load(flat + i, is_there, 0.0)
    by = tl.load(grad + i, is_there, 0.0) * tl.load(factor + row)
    is_outside = tl.abs(given) > tl.load(amax + row)
    code = _round(given, tl.load(scale + row), tl.load(smallest + row), tl.load(largest + row))
    error = (code * tl.load(step + row) - tl.where(is_outside, 0.0, given)) * by
    tl.store(out + i, tl.where(is_outside, 0.0, by), is_there)
    tl.store(parts + row * tl.num_programs(1) + part, tl.sum(tl.where(is_there, error, 0.0)))


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


def _exact(kernel, grid, *arguments, **constants) -> None:
    if all(grid):
        kernel[grid](*arguments, **constants, enable_fp_fusion=False)


def encode(x: Tensor, scale: Tensor, smallest: float, largest: float) -> Tensor:
    codes = torch.empty_like(x)
    _exact(_encode, _grid(x), x, scale, codes, smallest, largest, x.numel(), BLOCK=BLOCK)
    return codes


def rectify(
    x: Tensor, scale: Tensor, amax: Tensor, largest: float, has_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values, codes = torch.empty_like(x), torch.empty_like(x)
    mask = torch.empty_like(x, dtype=torch.uint8) if has_gradient else x.new_empty(0)
    arguments = x, scale, amax, values, codes, mask, largest, x.numel()
    _exact(_rectify, _grid(x), *arguments, HAS_MASK=has_gradient, BLOCK=BLOCK)
    return values, codes, mask


def pass_masked(grad: Tensor, mask: Tensor, bits: int) -> Tensor:
    out = torch.empty_like(grad)
    _exact(_pass_masked, _grid(grad), grad, mask, out, bits, grad.numel(), BLOCK=BLOCK)
    return out


def pass_inside(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    out = torch.empty_like(grad)
    _exact(_pass_inside, _grid(grad), grad, x, amax, out, grad.numel(), BLOCK=BLOCK)
    return out


def learn(
    grad: Tensor, x: Tensor, scale: Tensor, step: Tensor, amax: Tensor, smallest: float, largest: float,
    divisor: float, is_rectified: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid, out = _grid(x), torch.empty_like(grad)
    parts = grad.new_empty(grid)
    arguments = grad, x, scale, step, amax, out, parts, smallest, largest, x.numel()
    _exact(_learn, grid, *arguments, IS_RECTIFIED=is_rectified, BLOCK=BLOCK)
    return out, parts.sum() / divisor


def add_rounded(
    a: Tensor, scale: Tensor, step: Tensor, amax: Tensor, smallest: float, largest: float,
    codes_b: Tensor, step_b: Tensor, has_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(a)
    mask = torch.empty_like(a, dtype=torch.uint8) if has_gradient else a.new_empty(0)
    arguments = a, scale, step, amax, codes_b, step_b, y, mask, smallest, largest, a.numel()
    _exact(_add_rounded, _grid(a), *arguments, HAS_MASK=has_gradient, BLOCK=BLOCK)
    return y, mask


def scale_rows_(sums: Tensor, unit: Tensor, before: Tensor | None, behind: Tensor | None, axis: int) -> None:
    constants = {"HAS_BEFORE": before is not None, "HAS_BEHIND": behind is not None, "BLOCK": BLOCK}
    sizes = sums.numel(), sums.stride(axis), sums.shape[axis], unit.numel()
    none = unit  # a pointer that nobody reads
    addends = none if before is None else before, none if behind is None else behind
    _exact(_scale_rows, _grid(sums), sums, unit, *addends, *sizes, **constants)


def _row_grid(starts: Tensor, longest: int) -> tuple[int, int]:
    return len(starts) - 1, triton.cdiv(longest, ROW_BLOCK)


def round_rows(
    flat: Tensor, starts: Tensor, longest: int, scale: Tensor, step: Tensor, smallest: Tensor,
    largest: Tensor, has_values: bool, has_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    codes = torch.empty_like(flat)
    values = torch.empty_like(flat) if has_values else flat.new_empty(0)
    sums = flat.new_zeros((len(scale), 2)) if has_sums else flat.new_empty(0)
    arguments = flat, starts, scale, step, smallest, largest, codes, values, sums
    constants = {"HAS_VALUES": has_values, "HAS_SUMS": has_sums, "BLOCK": ROW_BLOCK}
    _exact(_round_rows, _row_grid(starts, longest), *arguments, **constants)
    return codes, values, sums


def pass_rows(
    grad: Tensor, flat: Tensor, starts: Tensor, longest: int, factor: Tensor, amax: Tensor
) -> Tensor:
    out = torch.empty_like(grad)
    _exact(_pass_rows, _row_grid(starts, longest), grad, flat, starts, factor, amax, out, BLOCK=ROW_BLOCK)
    return out


def learn_rows(
    grad: Tensor, flat: Tensor, starts: Tensor, longest: int, factor: Tensor, amax: Tensor, scale: Tensor,
    step: Tensor, smallest: Tensor, largest: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grid, out = _row_grid(starts, longest), torch.empty_like(grad)
    parts = grad.new_empty(grid)
    arguments = grad, flat, starts, factor, amax, scale, step, smallest, largest, out, parts
    _exact(_learn_rows, grid, *arguments, BLOCK=ROW_BLOCK)
    return out, parts.sum(1)
