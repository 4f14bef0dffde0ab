"""Convolutions of integer codes whose sums stay exact whole numbers.

fp32 holds every whole number up to 2^24. A sum that could pass it is split over the input channels, and the
parts are added in fp64. Codes of 9 to 16 bits are split first, into two digits of 8 bits each:
`code = 256 * high + low`; a convolution is linear, so the sums of digits are put together in fp64, which is
exact up to 2^53. The total is rounded to fp32 once, as an integer engine's 64-bit sum would be.

The codes that there are need fewer parts than the largest that there could be, but to look at them is to wait
for a GPU, and impossible while a network is traced (torch.compile, torch.export). A traced sum is split for
the largest codes; on a GPU one part is taken where codes of a step before were well below the limit. Whatever
the parts, the total is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.numerics.formats import EXACT_LIMIT, IntegerFormat
from cpq_train.quantization.numerics.one_pass import in_memory_order

HEADROOM = 1 / 8
"""Share of the limit that is left free where codes are those of a step before: AdamW moves a weight by about
the learning rate a step, which is a fraction of a code."""

DIGIT = 256

Convolve: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Axes(NamedTuple):
    """Where the channels of a convolution are.

    Attributes:
        output: Axis of the output channels in the weight.
        input: Axis of the input channels in the weight.
        feature: Axis of the channels in features.
        groups: In so many groups the channels are; they lie along axis 0 of the weight.
    """

    output: int
    input: int
    feature: int = 1
    groups: int = 1

    @property
    def groups_of_input(self) -> int:
        """Groups along the weight's input axis, which otherwise has the channels of one."""
        return self.groups if self.input == 0 else 1


class Codes(NamedTuple):
    """Whole numbers held in fp32, and the least and the largest they can be."""

    values: Tensor
    smallest: int
    largest: int

    @classmethod
    def of(cls, values: Tensor, fmt: IntegerFormat) -> Codes:
        """Codes of a format."""
        return cls(values, fmt.qmin, fmt.qmax)

    @property
    def magnitude(self) -> int:
        """The largest magnitude they can have."""
        return max(-self.smallest, self.largest)


class LargestSums(NamedTuple):
    """Of the codes of a weight, over an output channel.

    Attributes:
        of_a_sign: Largest sum of the magnitudes of codes of one sign.
        of_both: Largest sum of all magnitudes.
    """

    of_a_sign: float
    of_both: float

    def bound(self, x: Codes) -> float:
        """What no sum with an input passes: without negative codes there, the signs never add up."""
        return self.of_a_sign * x.largest if x.smallest >= 0 else self.of_both * x.magnitude


class Sums(NamedTuple):
    """Sums of products of codes.

    Attributes:
        values: fp32.
        bias_codes: (C',) whole numbers that have still to be added, which may be done in fp32, since no
            value was rounded; or None.
    """

    values: Tensor
    bias_codes: Tensor | None = None

    def total(self, axes: Axes) -> Tensor:
        """With the bias codes, rounded once."""
        return add_bias_codes(self.values.clone(), self.bias_codes, axes)


def exact_sum(
    x_codes: Tensor,
    w_codes: Tensor,
    x_format: IntegerFormat,
    w_format: IntegerFormat,
    convolve: Convolve,
    axes: Axes,
    bias_codes: Tensor | None = None,
    known: LargestSums | None = None,
    are_signed: bool = True,
) -> Sums:
    """`convolve(x_codes, w_codes) + bias_codes`, every sum exact and rounded to fp32 once.

    Args:
        x_codes: Codes of the features.
        w_codes: Codes of the weight.
        x_format: Of the features.
        w_format: Of the weight.
        convolve: Convolution of features with a weight, linear in both, for any number of input channels.
        axes: Where the channels are.
        bias_codes: (C',) whole numbers that fp32 holds, which belong to the sums.
        known: Of the weight's codes, a step before.
        are_signed: Whether a code of the features may be negative.

    Returns:
        What `convolve` returns, in fp32, differentiable in both codes.
    """
    x, w = Codes.of(x_codes, x_format), Codes.of(w_codes, w_format)
    if not are_signed:
        x = x._replace(smallest=0)
    if max(x_format.bits, w_format.bits) <= 8:
        sums = _sum_of_bytes(x, w, convolve, axes, known)
        if sums.dtype == torch.float32:
            return Sums(sums, bias_codes)
        return Sums(add_bias_codes(sums, bias_codes, axes).float())
    with torch.no_grad():
        total = torch.stack(
            [
                _sum_of_bytes(x_digit, w_digit, convolve, axes, None).double().mul_(x_place * w_place)
                for x_place, x_digit in _digits(x, x_format)
                for w_place, w_digit in _digits(w, w_format)
            ]
        ).sum(0)
        total = add_bias_codes(total, bias_codes, axes)
    if not torch.is_grad_enabled():
        return Sums(total.float())
    return Sums(_TakeGradient.apply(convolve(x_codes, w_codes), total))


def are_exact(sums: Tensor) -> bool:
    """Whether fp32 sums, each rounded once, are the whole numbers that they were."""
    ordered = in_memory_order(sums)  # or torch would copy it
    low, high = (sums if ordered is None else ordered).aminmax()
    return max(-float(low), float(high)) < EXACT_LIMIT


def largest_sum(w_codes: Tensor, largest_x: int, largest_w: int, axes: Axes) -> float:
    """What no sum passes whose input has no negative code; looks at the weights if it has to."""
    of_any_weight = w_codes.numel() // w_codes.shape[axes.output] * largest_x * largest_w
    if of_any_weight < EXACT_LIMIT:
        return of_any_weight
    return float(_magnitudes(w_codes.detach(), axes, one_sided=True).sum(1).max()) * largest_x


def add_bias_codes(sums: Tensor, bias_codes: Tensor | None, axes: Axes) -> Tensor:
    """Exact sums and their bias codes, in place; in fp32 the total is rounded here, once."""
    if bias_codes is None:
        return sums
    shape = [1] * sums.dim()
    shape[axes.feature] = -1
    return sums.add_(bias_codes.view(shape))


class _TakeGradient(Function):
    """The second tensor in fp32, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, exact: Tensor) -> Tensor:
        return exact.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _digits(codes: Codes, fmt: IntegerFormat) -> list[tuple[int, Codes]]:
    """Place value and digit, which is signed for the high place and 0 to 255 for the low one."""
    if fmt.bits <= 8:
        return [(1, codes)]
    high = torch.floor(codes.values / DIGIT)
    low = codes.values - high * DIGIT
    high_codes = Codes(high, codes.smallest // DIGIT, codes.largest // DIGIT)
    return [(DIGIT, high_codes), (1, Codes(low, 0, DIGIT - 1))]


def _sum_of_bytes(x: Codes, w: Codes, convolve: Convolve, axes: Axes, known: LargestSums | None) -> Tensor:
    """In fp32 where one sum is exact there, else in fp64."""
    num_parts = num_exact_parts(x, w, axes, known)
    if num_parts == 1:
        return convolve(x.values, w.values)
    if num_parts == 0:
        return convolve(x.values.double(), w.values.double())
    of_x = _chunks(x.values, num_parts, axes.feature, axes.groups)
    of_w = _chunks(w.values, num_parts, axes.input, axes.groups_of_input)
    return torch.stack([convolve(*part).double() for part in zip(of_x, of_w, strict=True)]).sum(0)


def _chunks(values: Tensor, num_parts: int, axis: int, groups: int) -> list[Tensor]:
    """Parts of the channels along an axis, each with a share of every group."""
    if groups == 1:
        return list(values.chunk(num_parts, axis))
    axis = axis % values.dim()
    parts = values.unflatten(axis, (groups, -1)).chunk(num_parts, axis + 1)
    return [part.flatten(axis, axis + 1) for part in parts]


def num_exact_parts(x: Codes, w: Codes, axes: Axes, known: LargestSums | None = None) -> int:
    """Into how many parts of the input channels a sum must be split so that each stays below 2^24.

    A layer's bound is the largest sum of |code_w| * max|code_x| over an output channel. Without negative
    codes in the input (behind a ReLU) positive and negative products never add up, and the bound is about
    half as large.

    Returns:
        0 where the products of a single channel could pass it.
    """
    num_channels = w.values.shape[axes.input] // axes.groups_of_input
    num_outputs = w.values.shape[axes.output] * axes.groups_of_input
    of_a_channel = w.values.numel() // (num_outputs * num_channels) * x.magnitude * w.magnitude
    if num_channels * of_a_channel < EXACT_LIMIT:
        return 1
    if torch.compiler.is_compiling() or not are_numbers_at_hand(w.values.device):
        if known is not None and known.bound(x) < EXACT_LIMIT * (1 - HEADROOM):
            return 1
        most = int((EXACT_LIMIT - 1) // of_a_channel)
        return -(-num_channels // most) if most else 0
    num_parts = _num_parts(w.values, x.magnitude, axes, one_sided=False)
    if num_parts != 1 and (x.smallest >= 0 or _is_never_negative(x.values)):
        num_parts = _num_parts(w.values, x.largest, axes, one_sided=True)
    return num_parts


def _is_never_negative(values: Tensor) -> bool:
    return bool(values.numel() and float(values.detach().amin()) >= 0)


def _num_parts(w_codes: Tensor, largest_x: int, axes: Axes, one_sided: bool) -> int:
    per_channel = _magnitudes(w_codes.detach(), axes, one_sided)
    for num_parts in range(1, per_channel.shape[1] + 1):
        parts = per_channel.chunk(num_parts, 1)
        worst = max(float(part.sum(1).max()) for part in parts)
        if worst * largest_x < EXACT_LIMIT and len(parts) == num_parts:
            return num_parts
    return 0


def _magnitudes(w_codes: Tensor, axes: Axes, one_sided: bool) -> Tensor:
    """Sums of |code_w| by output (rows) and input channel of its group (columns); one-sided, by sign too."""
    kernel = [d for d in range(w_codes.dim()) if d not in (axes.output, axes.input % w_codes.dim())]
    signs = (w_codes.clamp(min=0), w_codes.clamp(max=0)) if one_sided else (w_codes,)
    sums = torch.cat([w.abs().sum(kernel) if kernel else w.abs() for w in signs], axes.output)
    if axes.output == 0:
        return sums
    by_group = sums.view(axes.groups, -1, sums.shape[1])
    return by_group.transpose(1, 2).flatten(0, 1)
