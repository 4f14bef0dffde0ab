"""The dense layers."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from cpq_train.quantization.layers.convolution import QuantizedConvolution, RoundedWeight
from cpq_train.quantization.numerics import blocks, int8_kernel
from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.dense_convolution import DenseConvolution
from cpq_train.quantization.numerics.exact_sum import (
    EXACT_LIMIT,
    Axes,
    Convolve,
    Sums,
    add_bias_codes,
    are_exact,
    largest_sum,
)
from cpq_train.quantization.numerics.int8_kernel import Geometry


class _QuantizedDenseConvolution(QuantizedConvolution):
    """The dense convolutions: (B, C, ...) -> (B, C', ...), with or without B."""

    passes_gradient_of_codes = False

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C', ...)."""
        if not self.rounds(input):
            return cast(Tensor, super().forward(input))
        layer = cast(_ConvNd, self)
        return self.quantized(input, DenseConvolution.of(layer, layer.output_padding))

    def _integer(self, x: Tensor, convolve: Convolve) -> Tensor:
        assert isinstance(convolve, DenseConvolution)
        if x.dim() < self.weight.dim():  # not in the node: its output must not be a view
            return self._as_one_node(x.unsqueeze(0), convolve, convolve).squeeze(0)
        return self._as_one_node(x, convolve, convolve)

    def _sums(self, x: Coded, x_codes: Tensor, weight: RoundedWeight, convolve: Convolve) -> Sums:
        assert isinstance(convolve, DenseConvolution)
        if not convolve.more_behind:
            sums = self._sum_of_bytes(x_codes, weight.codes, convolve.geometry, weight.bias.codes)
            if sums is not None:
                return Sums(sums)
        return super()._sums(x, x_codes, weight, convolve)

    def _sum_of_bytes(
        self, x_codes: Tensor, w_codes: Tensor, geometry: Geometry, bias_codes: Tensor | None
    ) -> Tensor | None:
        """By the 8-bit kernel; None where it does not take the sum, or rounds it before the bias is added."""
        x_format, w_format = self._formats()
        largest = x_format.qmax, w_format.largest_magnitude
        weight, block = w_codes, w_codes.shape[2:] if blocks.are_apart(geometry, w_codes) else None
        if block is not None:
            weight, geometry = blocks.pixel_weight(w_codes), blocks.OF_A_PIXEL
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
            return sums
        return add_bias_codes(sums, bias_codes, self.axes) if are_exact(sums) else None


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


class QuantLinear(QuantizedConvolution, nn.Linear):
    """Linear with a quantized weight (axis 0) and input."""

    kind = "Linear"
    axes = Axes(output=0, input=1, feature=-1)

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if not self.rounds(input):
            return nn.Linear.forward(self, input)
        return self.quantized(input, functional.linear)
