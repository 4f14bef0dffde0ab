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

from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.dense_convolution import Gradients
from cpq_train.quantization.numerics.fake_quant import pass_inside, round_to_codes
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.numerics.one_pass import scale_
from cpq_train.quantization.quantizer import Range


class Convolution(Protocol):
    """What a layer's convolution has to do for backward."""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What it needs for that, beside what it is given."""

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        num_biases: list[int] | None,
        needed: tuple[bool, bool, bool],
        dtype: torch.dtype,
    ) -> Gradients:
        """Gradients of input, weight and bias, of each that is needed; `dtype` computes them if it can."""


class IntegerConvolution(NamedTuple):
    """What a convolution needs beside its tensors.

    Attributes:
        are_kept: Whether codes of the input are kept for backward, which otherwise makes them again.
        x_range: Range of the input.
        x_format: Integers of the input.
        w_range: Range of the weight.
        w_format: Integers of the weight.
        convolution: The layer's.
        exact_sum: That of two code tensors; what it returns is overwritten.
        unit: Value of 1 in that sum, (C',) or one number.
        feature_axis: Where features have their channels.
        is_bias_in_sum: Whether that sum has the bias already, as a code.
        gradients: What gradients are computed in.
    """

    are_kept: bool
    x_range: Range
    x_format: IntegerFormat
    w_range: Range
    w_format: IntegerFormat
    convolution: Convolution
    exact_sum: Callable[[Tensor, Tensor], Tensor]
    unit: Tensor
    feature_axis: int
    is_bias_in_sum: bool
    gradients: torch.dtype

    def __call__(self, x: Coded, weight: Tensor, w_codes: Tensor, bias: Tensor | None) -> Tensor:
        """`y = acc * unit + bias`, acc being the exact sum, which may have the bias in it.

        Args:
            x: The input.
            weight: Float.
            w_codes: Its codes, in fp32.
            bias: Float, or None.
        """
        tensors = x.source, weight, bias, self.w_range.log_amax, x.codes, w_codes
        return cast(Tensor, _IntegerConvolution.apply(*tensors, self))


class _IntegerConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_w: Tensor | None,
        x_codes: Tensor,
        w_codes: Tensor,
        of: IntegerConvolution,
    ) -> Tensor:
        sums = of.exact_sum(x_codes, w_codes)
        ctx.of = of
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x_codes if of.are_kept else source, weight, w_codes, *of.convolution.kept)
        return scale_(sums, of.unit, None if of.is_bias_in_sum else bias, of.feature_axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, w_codes, *_ = ctx.saved_tensors
        of: IntegerConvolution = ctx.of
        needs_x, needs_w, needs_bias, needs_log_w, *_ = ctx.needs_input_grad
        needed = (needs_x, needs_w or needs_log_w, needs_bias)
        x_codes = kept if of.are_kept else round_to_codes(kept, of.x_range.scale, of.x_format)
        w_values = w_codes * of.w_range.step
        grad_x, grad_w, grad_bias = of.convolution.gradients(
            grad, x_codes, w_values, ctx.bias_shape, needed, of.gradients
        )
        grad_log_w = None
        if grad_w is not None:
            grad_w.mul_(of.x_range.step)
        if needs_log_w:
            grad_log_w = of.w_range.log_gradient(cast(Tensor, grad_w), weight, w_codes.clone(), of.w_format)
        if grad_w is not None:
            grad_w = pass_inside(grad_w, weight, of.w_range.limit)
        return grad_x, grad_w, grad_bias, grad_log_w, None, None, None
