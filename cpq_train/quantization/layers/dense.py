"""The dense layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.layers.convolution import QuantizedConvolution, RoundedWeight
from cpq_train.quantization.layers.integer_convolution import Convolution
from cpq_train.quantization.numerics import blocks, int8_kernel
from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.dense_convolution import Backward, DenseConvolution, Gradients
from cpq_train.quantization.numerics.exact_sum import Axes, Sums, add_bias_codes, are_exact, largest_sum
from cpq_train.quantization.numerics.formats import EXACT_LIMIT
from cpq_train.quantization.numerics.int8_kernel import Geometry


class _QuantizedDenseConvolution(QuantizedConvolution):
    """The dense convolutions: (B, C, ...) -> (B, C', ...), with or without B."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are computed in."""
        return self.gradients

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C', ...)."""
        if not self.rounds(input):
            return cast(Tensor, super().forward(input))
        layer = cast(_ConvNd, self)
        return self.quantized(input, DenseConvolution.of(layer, layer.output_padding))

    def _integer(self, x: Tensor, convolution: Convolution, weight: RoundedWeight | None) -> Tensor:
        if x.dim() == -self.axes.feature:  # not in the node: its output must not be a view
            return super()._integer(x.unsqueeze(0), convolution, weight).squeeze(0)
        return super()._integer(x, convolution, weight)

    def _sums(self, x: Coded, x_codes: Tensor, weight: RoundedWeight, convolution: Convolution) -> Sums:
        assert isinstance(convolution, DenseConvolution)
        is_for_bytes = are_numbers_at_hand(x_codes.device) or convolution.geometry == int8_kernel.OF_A_PIXEL
        if is_for_bytes and not convolution.more_behind:
            sums = self._sum_of_bytes(x, x_codes, weight, convolution.geometry)
            if sums is not None:
                return sums
        return super()._sums(x, x_codes, weight, convolution)

    def _sum_of_bytes(
        self, x: Coded, x_codes: Tensor, rounded: RoundedWeight, geometry: Geometry
    ) -> Sums | None:
        """By an 8-bit kernel; None where it does not take the sum, or rounds it before the bias is added."""
        x_format, w_format = self._formats()
        w_codes, bias_codes = rounded.codes, rounded.bias.codes
        largest = x_format.qmax, w_format.largest_magnitude
        weight, block = w_codes, w_codes.shape[2:] if blocks.are_apart(geometry, w_codes) else None
        if block is not None:
            weight, geometry = blocks.pixel_weight(w_codes), int8_kernel.OF_A_PIXEL
        largest_x = x_format.largest_magnitude if x.are_signed else x_format.qmax
        if int8_kernel.takes_pixels(x_codes, weight, largest_x, largest[1], geometry):
            sums = int8_kernel.product_of_pixels(x_codes, weight)
            return Sums(sums if block is None else blocks.spread(sums, *block), bias_codes)
        if not int8_kernel.takes(x_codes, weight, *largest, geometry):
            return None
        bound = self._made_of_weight("bound", lambda: largest_sum(w_codes, *largest, self.axes))
        packed = self._made_of_weight(
            "packed", lambda: int8_kernel.pack(weight, geometry, x_codes.shape), state=x_codes.shape
        )
        in_kernel = bias_codes if bound < EXACT_LIMIT else None
        if in_kernel is not None and block is not None:
            in_kernel = in_kernel.repeat(block.numel())
        sums = int8_kernel.convolve(x_codes, packed, geometry, in_kernel)
        if block is not None:
            sums = blocks.spread(sums, *block)
        if bias_codes is None or in_kernel is not None:
            return Sums(sums)
        return Sums(add_bias_codes(sums, bias_codes, self.axes)) if are_exact(sums) else None


class QuantConv1d(_QuantizedDenseConvolution, nn.Conv1d):
    """Conv1d with a quantized weight (axis 0) and input."""

    kind = "Conv1d"
    axes = Axes(output=0, input=1, feature=-2)


class QuantConv2d(_QuantizedDenseConvolution, nn.Conv2d):
    """Conv2d with a quantized weight (axis 0) and input."""

    kind = "Conv2d"
    axes = Axes(output=0, input=1, feature=-3)


class QuantConv3d(_QuantizedDenseConvolution, nn.Conv3d):
    """Conv3d with a quantized weight (axis 0) and input."""

    kind = "Conv3d"
    axes = Axes(output=0, input=1, feature=-4)


class QuantConvTranspose2d(_QuantizedDenseConvolution, nn.ConvTranspose2d):
    """ConvTranspose2d with a quantized weight (axis 1, the output channels of a group) and input."""

    kind = "ConvTranspose2d"
    axes = Axes(output=1, input=0, feature=-3)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'); `output_size` as nn.ConvTranspose2d has it."""
        if not self.rounds(input):
            return nn.ConvTranspose2d.forward(self, input, output_size)
        sizes = (self.stride, self.padding, self.kernel_size)
        output_padding = self._output_padding(input, output_size, *sizes, 2, self.dilation)  # type: ignore[arg-type]
        return self.quantized(input, DenseConvolution.of(self, tuple(output_padding)))


class _Product:
    """What Linear computes: a convolution of one cell."""

    kept = ()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        return functional.linear(x, weight)

    of_codes = __call__

    def gradients(self, of: Backward) -> Gradients:
        """In fp32, whatever the type: see `integer_convolution.Convolution`."""
        grad, x, weight = of.grad, of.x, of.weight
        needs_x, needs_w, needs_bias = of.needed
        grads, inputs = grad.reshape(-1, grad.shape[-1]), x.float().reshape(-1, x.shape[-1])
        grad_w, grad_bias = grads.T @ inputs if needs_w else None, grads.sum(0) if needs_bias else None
        return grad @ weight if needs_x else None, grad_w, grad_bias


class QuantLinear(QuantizedConvolution, nn.Linear):
    """Linear with a quantized weight (axis 0) and input."""

    kind = "Linear"
    axes = Axes(output=0, input=1, feature=-1)

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """As a convolution has them."""
        return self.out_features

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not self.rounds(input):
            return nn.Linear.forward(self, input)
        return self.quantized(input, _Product())
