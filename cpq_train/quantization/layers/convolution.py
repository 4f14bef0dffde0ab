"""What all quantized layers with a weight share: quantizers, and the product of codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers.integer_convolution import Convolution, IntegerConvolution
from cpq_train.quantization.numerics.biases import (
    STEP_OF_ZERO_CHANNEL,
    Bias,
    BiasKind,
    as_deployed,
    rounded_to_half,
)
from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.exact_sum import (
    HEADROOM,
    Axes,
    Codes,
    LargestSums,
    Sums,
    exact_sum,
)
from cpq_train.quantization.numerics.formats import EXACT_LIMIT, IntegerFormat
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme
from cpq_train.quantization.scope import are_saved_tensors_hooked, version_of

T = TypeVar("T")


class RoundedWeight(NamedTuple):
    """A weight, and the bias, as the layer's sum has them.

    Attributes:
        codes: In the shape of the weight, fp32; their gradient is that of its values.
        values: Of the codes, for backward; None where they are not known yet, or there was none to come.
        step: Value of code 1 as the output channels have it, (C',) or one number.
        unit: Value of 1 in the sum, likewise.
        bias: As deployed.
        step_as_weight: Value of code 1, broadcastable to the weight; None where there are values.
        is_narrow: Whether no sum of codes passes what fp32 holds, whatever the codes.
        known: Largest sums of codes, a step before.
        weight: What was rounded; None where that is beyond doubt.
        version: How often it had been written to.
    """

    codes: Tensor
    values: Tensor | None
    step: Tensor
    unit: Tensor
    bias: Bias
    step_as_weight: Tensor | None = None
    is_narrow: bool = False
    known: LargestSums | None = None
    weight: Tensor | None = None
    version: int = 0

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is still what a weight is rounded to, with a gradient where there may be one.

        A checkpoint has to save as much in every run: under its hooks each layer rounds its own.
        """
        if weight is not self.weight or version_of(weight) != self.version:
            return False
        # Made without gradients, it has no values and passes none on.
        return not torch.is_grad_enabled() or (self.values is not None and not are_saved_tensors_hooked())


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
        x_quantizer, w_quantizer = self._input_quantizer, self._weight_quantizer
        if x_quantizer is not None and x_quantizer._if_calib:
            x_quantizer.collect(x)
        if self.is_bypassed:
            return False
        return any(q is not None and not q._disabled for q in (x_quantizer, w_quantizer))

    @property
    def is_integer(self) -> bool:
        """Whether the layer is an integer sum now."""
        return not self.why_simulated and not self.is_bypassed and len(self._active()) == 2

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are computed in."""
        return torch.float32

    @property
    def is_narrow(self) -> bool:
        """Whether no sum of codes passes what fp32 holds, even of the largest codes there are."""
        x_format, w_format = self._formats()
        num_products = self.weight.numel() // self.weight.shape[self.axes.output]
        largest = x_format.largest_magnitude * w_format.largest_magnitude
        return max(x_format.bits, w_format.bits) <= 8 and num_products * largest < EXACT_LIMIT

    def has_outgrown(self, before: LargestSums, now: LargestSums) -> bool:
        """Whether one part sufficed for the sums `before`, by `num_exact_parts`, and does not now."""
        codes = Codes.of(self.weight, self._formats()[0])
        inputs = codes, codes._replace(smallest=0)
        return any(
            before.bound(x) < EXACT_LIMIT * (1 - HEADROOM) and now.bound(x) >= EXACT_LIMIT for x in inputs
        )

    def _active(self) -> list[Quantizer]:
        both = (self._input_quantizer, self._weight_quantizer)
        return [q for q in both if q is not None and q.is_active]

    def quantized(self, x: Tensor, convolution: Convolution) -> Tensor:
        """The layer's output, bias included.

        Args:
            x: Features.
            convolution: The layer's, without weight and bias.

        Raises:
            UserError: The network was made one of another floating-point type.
        """
        weight = self._known_weight()
        if weight is None and self.weight.dtype != torch.float32:
            raise UserError(
                f"the weight of {self.kind}({self.extra_repr()}) is {self.weight.dtype}; accepted: "
                "torch.float32, under autocast too"
            )
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # codes and their sums need fp32
                return self._computed(x, convolution, weight)
        return self._computed(x, convolution, weight)

    def _computed(self, x: Tensor, convolution: Convolution, weight: RoundedWeight | None) -> Tensor:
        if weight is not None or self.is_integer:
            return self._integer(x.float(), convolution, weight)
        return self._simulated(x, convolution)

    def _simulated(self, x: Tensor, convolution: Convolution) -> Tensor:
        x = x.float() if self._input_quantizer is None else self._input_quantizer(x)
        weight = self.weight if self._weight_quantizer is None else self._weight_quantizer(self.weight)
        out = convolution(x, weight)
        if self.bias is None:
            return out
        bias = rounded_to_half(self.bias) if self.bias_kind == "fp16" else self.bias
        return out + self._per_channel(bias, out)

    def _integer(self, x: Tensor, convolution: Convolution, weight: RoundedWeight | None) -> Tensor:
        x_quantizer = self._input_quantizer
        assert x_quantizer is not None
        coded = x_quantizer.coded(x)
        weight = self._rounded_weight(x) if weight is None else weight
        are_kept = coded.are_bytes or not coded.has_numbers or x_quantizer.is_shared
        node = IntegerConvolution(
            x_scale=None if are_kept else x_quantizer.range_of(x).scale,
            x_format=cast(IntegerFormat, x_quantizer.format),
            w_step=weight.step_as_weight,
            convolution=convolution,
            unit=weight.unit,
            feature_axis=self.axes.feature,
            is_bias_in_sum=weight.bias.is_in_sum,
            gradients=self.gradient_dtype,
        )
        return node(
            *(coded, weight.codes, weight.values, weight.bias.values),
            lambda codes: self._sums(coded, codes, weight, convolution),
        )

    def _rounded_weight(self, x: Tensor) -> RoundedWeight:
        """The weight and bias for an input, rounded now."""
        assert self._input_quantizer is not None
        quantizer = self._weight_quantizer
        assert quantizer is not None
        step_x, found = self._input_quantizer.range_of(x).step, quantizer.range_of(self.weight)
        codes, _ = quantizer.codes(self.weight, step_x, self.axes.output)
        step_w = self.per_output(found.step)
        bias = as_deployed(self.bias, self.bias_kind, step_x * step_w)
        return RoundedWeight(codes, None, step_w, step_x * step_w, bias, step_as_weight=found.step)

    def _known_weight(self) -> RoundedWeight | None:
        """The weight and bias as they were rounded together with all others, if they were."""
        quantizer = self._weight_quantizer
        if quantizer is None or not quantizer.scope.weights or is_compiling():
            return None
        known = quantizer.scope.weights.get(self)
        return known if known is not None and known.is_of(self.weight) else None

    def _made_of_weight(self, what: str, make: Callable[[], T], state: Any = None) -> T:
        """What is made of the weight and a state, once in a block in which neither changes."""
        assert self._weight_quantizer is not None
        return cast(T, self._weight_quantizer.scope.keep((self, what), make, state))

    def _sums(self, x: Coded, x_codes: Tensor, weight: RoundedWeight, convolution: Convolution) -> Sums:
        """Exact sums of products of codes, see `exact_sum`; `x_codes` are those of `x`, in either form."""
        if weight.is_narrow:
            return Sums(convolution.of_codes(x_codes.float(), weight.codes), weight.bias.codes)
        return exact_sum(
            *(x_codes.float(), weight.codes, *self._formats(), convolution.of_codes),
            *(self.axes._replace(groups=self.groups), weight.bias.codes, weight.known, x.are_signed),
        )

    def _formats(self) -> tuple[IntegerFormat, IntegerFormat]:
        x_quantizer, w_quantizer = self._input_quantizer, self._weight_quantizer
        assert x_quantizer is not None
        assert w_quantizer is not None
        return cast("tuple[IntegerFormat, IntegerFormat]", (x_quantizer.format, w_quantizer.format))

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.axes.feature] = -1
        return values.view(shape)
