"""A dense convolution on integer codes as one autograd node, with the backward pass of the float convolution.

Forward is the sum of codes times a scale (the room says why). Backward convolves with the values of the
weight in place of its codes: so gradients need no scaling of their own, the bias's comes with the weight's,
and a sum that was split to stay exact is not split again.

The codes of the input are not kept: rounding the input once more, which its ReLU keeps anyway, costs less
than reading them back from memory, and the layer needs no more memory than the float one. Only codes that
several layers share are made once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.autograd import Function

from cpq_train.quantization.numerics.dense_convolution import DenseConvolution
from cpq_train.quantization.numerics.fake_quant import pass_inside, round_to_codes
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.quantizer import Range


class IntegerConvolution(NamedTuple):
    """What a convolution needs beside its tensors.

    Attributes:
        x_range: Range of the input.
        x_format: Integers of the input; None where it comes as codes, whose gradient is then that of the
            values they stand for.
        w_range: Range of the weight.
        w_format: Integers of the weight.
        convolution: The layer's.
        exact_sum: That of two code tensors; what it returns is overwritten.
        unit: Value of 1 in that sum, (C',) or one number.
        is_bias_in_sum: Whether that sum has the bias already, as a code.
    """

    x_range: Range
    x_format: IntegerFormat | None
    w_range: Range
    w_format: IntegerFormat
    convolution: DenseConvolution
    exact_sum: Callable[[Tensor, Tensor], Tensor]
    unit: Tensor
    is_bias_in_sum: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`y = acc * unit + bias`, acc being the exact sum, which may have the bias in it."""
        log_x = None if self.x_format is None else self.x_range.log_amax
        return cast(Tensor, _IntegerConvolution.apply(x, weight, bias, log_x, self.w_range.log_amax, self))

    def codes_of(self, x: Tensor) -> Tensor:
        """The codes of the input."""
        return x if self.x_format is None else round_to_codes(x, self.x_range.scale, self.x_format)


class _IntegerConvolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_x: Tensor | None,
        log_w: Tensor | None,
        of: IntegerConvolution,
    ) -> Tensor:
        w_codes = round_to_codes(weight, of.w_range.scale, of.w_format)
        per_channel = (-1, *[1] * (weight.dim() - 2))
        y = of.exact_sum(of.codes_of(x), w_codes).mul_(of.unit.view(per_channel))
        ctx.of = of
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x, weight, w_codes.mul_(of.w_range.step))
        return y if bias is None or of.is_bias_in_sum else y.add_(bias.view(per_channel))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, w_values = ctx.saved_tensors
        of: IntegerConvolution = ctx.of
        needs_x, needs_w, needs_bias, needs_log_x, needs_log_w, _ = ctx.needs_input_grad
        needed = (needs_x or needs_log_x, needs_w or needs_log_w, needs_bias)
        x_codes = of.codes_of(x)
        grad_x, grad_w, grad_bias = of.convolution.gradients(grad, x_codes, w_values, ctx.bias_shape, needed)
        grad_log_x = grad_log_w = None
        if grad_w is not None:
            grad_w.mul_(of.x_range.step)
        if needs_log_x:
            fmt = cast(IntegerFormat, of.x_format)
            grad_log_x = of.x_range.log_gradient(cast(Tensor, grad_x), x, x_codes, fmt)
        if needs_log_w:
            w_codes = round_to_codes(weight, of.w_range.scale, of.w_format)
            grad_log_w = of.w_range.log_gradient(cast(Tensor, grad_w), weight, w_codes, of.w_format)
        if grad_x is not None and of.x_format is not None:
            grad_x = pass_inside(grad_x, x, of.x_range.limit)
        if grad_w is not None:
            grad_w = pass_inside(grad_w, weight, of.w_range.limit)
        return grad_x, grad_w, grad_bias, grad_log_x, grad_log_w, None
