"""The dense layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cpq_train.quantization.layers.convolution import QuantizedConvolution
from cpq_train.quantization.layers.integer_convolution import IntegerConvolution
from cpq_train.quantization.numerics import int8_kernel
from cpq_train.quantization.numerics.biases import as_deployed
from cpq_train.quantization.numerics.exact_sum import Axes, Convolve, add_bias_codes, are_exact
from cpq_train.quantization.numerics.int8_kernel import Geometry


class _QuantizedDenseConvolution(QuantizedConvolution):
    """The dense layers: (B, C, H, W) -> (B, C', H', W')."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not self.rounds(input):
            return cast(Tensor, super().forward(input))
        return self.quantized(input, self.convolve)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution with a given weight, without a bias."""
        return torch.convolution(x, weight, None, *self._geometry())

    def _integer(self, x: Tensor, convolve: Convolve) -> Tensor:
        assert self._input_quantizer is not None
        assert self._weight_quantizer is not None
        x_format, w_format = self._formats()
        x_range, w_range = self._input_quantizer.range_of(x), self._weight_quantizer.range_of(self.weight)
        bias = as_deployed(self.bias, self.bias_kind, x_range.step, w_range.step)
        convolution = IntegerConvolution(
            x_range,
            None if self._input_quantizer.is_shared else x_format,
            w_range,
            w_format,
            lambda codes_x, codes_w: self._exact_sum(codes_x, codes_w, convolve, bias.codes),
            self._geometry(),
            bias.is_in_sum,
        )
        if self._input_quantizer.is_shared:
            x, _ = self._input_quantizer.codes(x)
        return convolution(x, self.weight, bias.values)

    def _exact_sum(
        self, x_codes: Tensor, w_codes: Tensor, convolve: Convolve, bias_codes: Tensor | None
    ) -> Tensor:
        (x_format, w_format), geometry = self._formats(), self._geometry()
        largest_x, largest_w = x_format.qmax, w_format.largest_magnitude
        if int8_kernel.takes(x_codes, w_codes, largest_x, largest_w, geometry):
            sums = int8_kernel.convolve(x_codes, w_codes, geometry)
            # It rounds its sums once; with a bias they must not have been rounded yet.
            if bias_codes is None or are_exact(sums, w_codes[0].numel() * largest_x * largest_w):
                return add_bias_codes(sums, bias_codes, self.axes)
        return super()._exact_sum(x_codes, w_codes, convolve, bias_codes)

    def _geometry(self) -> Geometry:
        layer = cast(_ConvNd, self)
        padding = cast(tuple[int, ...], layer.padding)
        return Geometry(
            layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
        )


class QuantConv2d(_QuantizedDenseConvolution, nn.Conv2d):
    """Conv2d with a quantized weight (axis 0) and input."""

    kind = "Conv2d"
    axes = Axes(output=0, input=1)


class QuantConvTranspose2d(_QuantizedDenseConvolution, nn.ConvTranspose2d):  # type: ignore[misc]  # no output_size
    """ConvTranspose2d with a quantized weight (axis 1, the output channels) and input."""

    kind = "ConvTranspose2d"
    axes = Axes(output=1, input=0)
