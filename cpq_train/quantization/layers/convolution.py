"""What all quantized layers with a weight share: quantizers, and the product of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers.integer_convolution import Convolution, IntegerConvolution
from cpq_train.quantization.numerics.biases import (
    STEP_OF_ZERO_CHANNEL,
    BiasKind,
    as_deployed,
    rounded_to_half,
)
from cpq_train.quantization.numerics.exact_sum import Axes, Convolve, exact_sum
from cpq_train.quantization.numerics.fake_quant import rescale, round_to_codes
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme

T = TypeVar("T")


class QuantizedConvolution(nn.Module):
    """What all of them share; mixed in before the float layer.

    `_input_quantizer` and `_weight_quantizer` are None where that tensor stays float; `bias_kind` says what
    the bias is in the layer's arithmetic, `widens_steps` what becomes of steps too small for it. While
    `is_bypassed` the layer is the float one, whatever its quantizers, which other layers may share, are
    doing. Dense layers compute their gradients in `gradients`. `why_simulated` is empty where the layer is an
    integer sum, see `LayerScheme.why_simulated`. `float_class` is what the layer was.
    """

    kind: ClassVar[str]
    axes: ClassVar[Axes]

    weight: Any
    bias: Any
    groups = 1  # a convolution has its own
    out_channels: int
    is_bypassed = False
    gradients = torch.float32
    float_class: type[nn.Module]
    _input_quantizer: Quantizer | None
    _weight_quantizer: Quantizer | None
    why_simulated: str
    bias_kind: BiasKind
    widens_steps: bool

    def attach(self, scheme: LayerScheme) -> None:
        """Create the quantizers; the weight's range is known at once."""
        self.why_simulated = scheme.why_simulated
        self._input_quantizer = None if scheme.input.is_off else Quantizer(scheme.input)
        self._weight_quantizer = None
        if not scheme.weight.is_off:
            axis = scheme.weight_axis(self.kind)
            channels = 1 if axis is None else self.weight.shape[axis]
            self._weight_quantizer = Quantizer(scheme.weight, axis, channels, self.weight.dim())
            self._weight_quantizer.set_amax_from(self.weight)
        self.take_bias(scheme)

    def take_bias(self, scheme: LayerScheme) -> None:
        """Let the bias be of the kind that a scheme has."""
        self.bias_kind, self.widens_steps = scheme.bias, scheme.widens_steps
        if self._weight_quantizer is not None:
            on_grid = self.bias_kind == "accumulator"
            self._weight_quantizer.step_of_zero = STEP_OF_ZERO_CHANNEL if on_grid else 1.0

    def unit(self) -> Tensor:
        """The value of 1 in the layer's sums, (C',) or one number; its input's range has to be static."""
        x_quantizer, w_quantizer = self._input_quantizer, self._weight_quantizer
        assert x_quantizer is not None
        assert w_quantizer is not None
        assert x_quantizer.amax is not None
        step_w = w_quantizer.range_of(self.weight).step
        return x_quantizer.range_of(x_quantizer.amax).step * self.per_output(step_w)

    def per_output(self, step_w: Tensor) -> Tensor:
        """The steps of the weight as the output channels have them, (C',), or one number.

        Groups lie along axis 0 of a weight. Where that is the input axis, channel j of every group shares one
        range, as in pytorch-quantization.
        """
        step_w = step_w.reshape(-1)
        is_shared = self.axes.input == 0 and step_w.numel() > 1
        return step_w.repeat(self.out_channels // step_w.numel()) if is_shared else step_w

    def rounds(self, x: Tensor) -> bool:
        """Whether anything is rounded now; feeds the input's calibrator while it is collecting."""
        if self._input_quantizer is not None and self._input_quantizer._if_calib:
            self._input_quantizer.collect(x)
        return not self.is_bypassed and bool(self._active())

    def _active(self) -> list[Quantizer]:
        both = (self._input_quantizer, self._weight_quantizer)
        return [q for q in both if q is not None and q.is_active]

    def quantized(self, x: Tensor, convolve: Convolve) -> Tensor:
        """The layer's output, bias included.

        Args:
            x: Features.
            convolve: The convolution of features with a weight, without bias; linear in both.

        Raises:
            UserError: The network was made one of another floating-point type.
        """
        if self.weight.dtype != torch.float32:
            raise UserError(
                f"the weight of {self.kind}({self.extra_repr()}) is {self.weight.dtype}; accepted: "
                "torch.float32, under autocast too"
            )
        with torch.autocast(x.device.type, enabled=False):  # codes and their sums need fp32
            if not self.why_simulated and len(self._active()) == 2:
                return self._integer(x.float(), convolve)
            return self._simulated(x, convolve)

    def _simulated(self, x: Tensor, convolve: Convolve) -> Tensor:
        x = x.float() if self._input_quantizer is None else self._input_quantizer(x)
        weight = self.weight if self._weight_quantizer is None else self._weight_quantizer(self.weight)
        out = convolve(x, weight)
        if self.bias is None:
            return out
        bias = rounded_to_half(self.bias) if self.bias_kind == "fp16" else self.bias
        return out + self._per_channel(bias, out)

    def _integer(self, x: Tensor, convolve: Convolve) -> Tensor:
        assert self._input_quantizer is not None
        assert self._weight_quantizer is not None
        step_x = self._input_quantizer.range_of(x).step
        w_codes, step_w = self._weight_quantizer.codes(self.weight, step_x)
        step_w = self.per_output(step_w)
        bias = as_deployed(self.bias, self.bias_kind, step_x * step_w)
        acc = self._exact_sum(self._input_quantizer.coded(x).in_fp32(), w_codes, convolve, bias.codes)
        return rescale(acc, step_x, step_w, bias.values, self.axes.feature, bias.is_in_sum)

    def _as_one_node(self, x: Tensor, convolution: Convolution, convolve: Convolve) -> Tensor:
        """As `_integer`, by an autograd node of its own.

        Args:
            x: Features, fp32.
            convolution: Makes the gradients.
            convolve: The convolution of features with a weight.
        """
        assert self._input_quantizer is not None
        assert self._weight_quantizer is not None
        x_format, w_format = self._formats()
        x_range, w_range = self._input_quantizer.range_of(x), self._weight_quantizer.range_of(self.weight)
        coded = self._input_quantizer.coded(x)
        w_codes = self._made_of_weight(
            "codes", lambda: round_to_codes(self.weight.detach(), w_range.scale, w_format)
        )
        unit = x_range.step * self.per_output(w_range.step)
        bias = as_deployed(self.bias, self.bias_kind, unit)
        node = IntegerConvolution(
            are_kept=coded.are_bytes or self._input_quantizer.is_shared,
            x_range=x_range,
            x_format=x_format,
            w_range=w_range,
            w_format=w_format,
            convolution=convolution,
            exact_sum=lambda x, w: self._exact_sum(x, w, convolve, bias.codes),
            unit=unit,
            feature_axis=self.axes.feature,
            is_bias_in_sum=bias.is_in_sum,
            gradients=self.gradients,
        )
        return node(coded, self.weight, w_codes, bias.values)

    def _made_of_weight(self, what: str, make: Callable[[], T], state: Any = None) -> T:
        """What is made of the weight and a state, once in a block in which neither changes."""
        assert self._weight_quantizer is not None
        return cast(T, self._weight_quantizer.scope.keep((self, what), make, state))

    def _exact_sum(
        self, x_codes: Tensor, w_codes: Tensor, convolve: Convolve, bias_codes: Tensor | None
    ) -> Tensor:
        axes = self.axes._replace(groups=self.groups)
        return exact_sum(x_codes, w_codes, *self._formats(), convolve, axes, bias_codes)

    def _formats(self) -> tuple[IntegerFormat, IntegerFormat]:
        both = (self._input_quantizer, self._weight_quantizer)
        x_format, w_format = (cast(IntegerFormat, cast(Quantizer, q).format) for q in both)
        return x_format, w_format

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.axes.feature] = -1
        return values.view(shape)
