"""A convolution on integer codes as one autograd node, with the backward pass of the float convolution.

Forward is the sum of codes times a scale (the room says why). Backward convolves with the values of the
weight in place of its codes: so gradients need no scaling of their own, the bias's comes with the weight's,
and a sum that was split to stay exact is not split again.

Codes of the input that are bytes, or that several layers share, are kept for backward; others, a tensor of
which is as large as the input itself, are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cpq_train.quantization.numerics.coded import Coded, codes_of
from cpq_train.quantization.numerics.dense_convolution import Backward, Gradients
from cpq_train.quantization.numerics.exact_sum import Sums
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.numerics.one_pass import scale_


class Convolution(Protocol):
    """What a layer's convolution has to do for backward."""

    def __call__(self, x: Tensor, weight: Tensor, /) -> Tensor:
        """Of features with a weight, without a bias; linear in both, and differentiable."""

    def of_codes(self, x: Tensor, weight: Tensor, /) -> Tensor:
        """The same of codes whose sums fp32 holds, exact, without a gradient."""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What it needs for that, beside what it is given."""

    def gradients(self, of: Backward) -> Gradients:
        """Gradients of input, weight and bias."""


class IntegerConvolution(NamedTuple):
    """What a convolution needs beside its tensors.

    Attributes:
        x_scale: Codes per unit of the input, whose codes backward makes again; None if they are kept for it.
        x_format: Integers of the input.
        w_step: Value of code 1 of the weight, broadcastable to it; None where its values are at hand.
        convolution: The layer's.
        unit: Value of 1 in that sum, (C',) or one number.
        feature_axis: Where features have their channels.
        is_bias_in_sum: Whether codes in that sum stand for the bias.
        gradients: What gradients are computed in.
    """

    x_scale: Tensor | None
    x_format: IntegerFormat
    w_step: Tensor | None
    convolution: Convolution
    unit: Tensor
    feature_axis: int
    is_bias_in_sum: bool
    gradients: torch.dtype

    def __call__(
        self,
        x: Coded,
        w_codes: Tensor,
        w_values: Tensor | None,
        bias: Tensor | None,
        sums: Callable[[Tensor], Sums],
    ) -> Tensor:
        """`y = acc * unit + bias`, acc being the exact sum, which may have the bias in it.

        Args:
            x: The input.
            w_codes: Codes of the weight, in fp32; get the gradient of the values with an input in codes.
            w_values: Their values, if they are at hand.
            bias: Float, or None.
            sums: Of codes of the input with those of the weight; what it returns is overwritten. The node
                does not keep it, nor what it may hold.
        """
        return cast(Tensor, _IntegerConvolution.apply(x.source, w_codes, bias, x.codes, w_values, sums, self))


class _IntegerConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        w_codes: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        w_values: Tensor | None,
        sums_of: Callable[[Tensor], Sums],
        of: IntegerConvolution,
    ) -> Tensor:
        sums = sums_of(x_codes)
        ctx.of = of
        ctx.bias_shape = None if bias is None else bias.shape
        kept_x, kept_w = x_codes if of.x_scale is None else source, w_codes if w_values is None else w_values
        ctx.save_for_backward(*map(_savable, (kept_x, kept_w, *of.convolution.kept)))
        to_add = None if of.is_bias_in_sum else bias
        return scale_(sums.values, of.unit, to_add, of.feature_axis, sums.bias_codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept_x, kept_w, *_ = ctx.saved_tensors
        of: IntegerConvolution = ctx.of
        x_codes = kept_x if of.x_scale is None else codes_of(kept_x, of.x_scale, of.x_format)
        w_values = kept_w if of.w_step is None else kept_w * of.w_step
        backward = Backward(grad, x_codes, w_values, ctx.bias_shape, ctx.needs_input_grad[:3], of.gradients)
        return *of.convolution.gradients(backward), None, None, None, None


def _savable(tensor: Tensor) -> Tensor:
    """One of inference mode cannot be saved for a backward pass, which `enable_grad` may ask for there."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
