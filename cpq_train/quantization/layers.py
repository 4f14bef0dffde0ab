"""Quantized layers, trained in the arithmetic that is deployed.

A layer whose weight and input both have integer codes is an integer convolution times a scale per channel,
and is computed so:

    acc = conv(codes_x, codes_w);    y = acc * (step_x * step_w);    y = y + bias

or with the bias in the sum, or in half precision (`numerics/biases.py`).

`exact_sum.py` keeps every sum a whole number that is held exactly, so that the result does not depend on the
order of summation, the kernel or the device. A layer of which only the weight or only the input is rounded,
or whose numbers are no integers, is the float layer on rounded values.

Every class extends the float layer it replaces and takes over the float module in place (`quantize_layer`),
so names, parameters and shapes stay what they were. Gradients are those of pytorch-quantization's QuantConv
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cpq_train.quantization.dense import IntegerConvolution
from cpq_train.quantization.numerics import int8_kernel
from cpq_train.quantization.numerics.biases import (
    STEP_OF_ZERO_CHANNEL,
    BiasKind,
    as_deployed,
    rounded_to_half,
)
from cpq_train.quantization.numerics.exact_sum import (
    Axes,
    Convolve,
    add_bias_codes,
    are_exact,
    exact_sum,
)
from cpq_train.quantization.numerics.fake_quant import add_codes, rescale
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.numerics.int8_kernel import Geometry
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import LayerScheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SubMConv3d


class QuantizedConvolution(nn.Module):
    """What the four quantized convolutions share; mixed in before the float layer.

    `_input_quantizer` and `_weight_quantizer` are None where that tensor stays float; `bias_kind` says what
    the bias is in the layer's arithmetic, `widens_steps` what becomes of steps too small for it. While
    `is_bypassed` the layer is the float one, whatever its quantizers, which other layers may share, are
    doing. `why_simulated` is empty where the layer is an integer sum, see `LayerScheme.why_simulated`.
    """

    kind: ClassVar[str]
    axes: ClassVar[Axes]

    weight: Any
    bias: Any
    is_bypassed = False
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
            self._weight_quantizer.set_step_of_zero(STEP_OF_ZERO_CHANNEL if on_grid else 1.0)

    def unit(self) -> Tensor:
        """The value of 1 in the layer's sums, (C',) or one number; its input's range has to be static."""
        x_quantizer, w_quantizer = self._input_quantizer, self._weight_quantizer
        assert x_quantizer is not None
        assert w_quantizer is not None
        assert x_quantizer.amax is not None
        step_w = w_quantizer.range_of(self.weight).step
        return x_quantizer.range_of(x_quantizer.amax).step * step_w.reshape(-1)

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
        """
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
        x_codes, step_x = self._input_quantizer.codes(x)
        w_codes, step_w = self._weight_quantizer.codes(self.weight, step_x)
        bias = as_deployed(self.bias, self.bias_kind, step_x, step_w)
        acc = self._exact_sum(x_codes, w_codes, convolve, bias.codes)
        return rescale(acc, step_x, step_w, bias.values, self.axes.feature, bias.is_in_sum)

    def _exact_sum(
        self, x_codes: Tensor, w_codes: Tensor, convolve: Convolve, bias_codes: Tensor | None
    ) -> Tensor:
        return exact_sum(x_codes, w_codes, *self._formats(), convolve, self.axes, bias_codes)

    def _formats(self) -> tuple[IntegerFormat, IntegerFormat]:
        both = (self._input_quantizer, self._weight_quantizer)
        x_format, w_format = (cast(IntegerFormat, cast(Quantizer, q).format) for q in both)
        return x_format, w_format

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.axes.feature] = -1
        return values.view(shape)


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


class _QuantizedSparseConvolution(QuantizedConvolution):
    """The sparse layers: features (V, C), weight KRSC."""

    axes = Axes(output=0, input=-1)

    convolve: Callable[[SparseConvTensor, Tensor], SparseConvTensor]

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        """Sparse tensor in, sparse tensor out."""
        if not self.rounds(input.features):
            return cast(SparseConvTensor, super().forward(input))
        outputs: list[SparseConvTensor] = []

        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            outputs.append(self.convolve(input.replace_feature(x), weight))
            return cast(Tensor, outputs[-1].features)

        features = self.quantized(input.features, convolve)
        return outputs[-1].replace_feature(features)


class QuantSubMConv3d(_QuantizedSparseConvolution, SubMConv3d):
    """SubMConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SubMConv3d"


class QuantSparseConv3d(_QuantizedSparseConvolution, SparseConv3d):
    """SparseConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SparseConv3d"


class QuantAdd(ResidualAdd):
    """The residual add of two quantized tensors: codes_a * step_a + codes_b * step_b.

    `_input_quantizer` rounds the branch; the identity goes through `_residual_quantizer` where it shares the
    range of the block's input (`Scheme.share_residual`), else through `_input_quantizer` too.
    """

    kind = "ResidualAdd"
    is_bypassed = False

    why_simulated: str
    _input_quantizer: Quantizer
    _residual_quantizer: Quantizer | None

    def attach(self, scheme: LayerScheme) -> None:
        """Create the quantizer."""
        self.why_simulated = scheme.why_simulated
        self._input_quantizer = Quantizer(scheme.input)
        self._residual_quantizer = None

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """(V, C) + (V, C)."""
        residual = self._residual_quantizer or self._input_quantizer
        pairs = ((self._input_quantizer, branch), (residual, identity))
        for quantizer, tensor in pairs:
            if quantizer._if_calib:
                quantizer.collect(tensor)
        if self.is_bypassed or not self._input_quantizer.is_active:
            return super().forward(branch, identity)
        if self.why_simulated:
            return super().forward(*(quantizer(tensor) for quantizer, tensor in pairs))
        (a, step_a), (b, step_b) = (quantizer.codes(tensor) for quantizer, tensor in pairs)
        return add_codes(a, step_a, b, step_b)


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    SubMConv3d: QuantSubMConv3d,
    SparseConv3d: QuantSparseConv3d,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    ResidualAdd: QuantAdd,
}
"""Float layer -> quantized layer."""

ADDED = (
    *("_input_quantizer", "_weight_quantizer", "_residual_quantizer"),
    *("why_simulated", "bias_kind", "widens_steps"),
)
"""What a quantized layer has beyond the float one."""


def quantize_layer(layer: nn.Module, scheme: LayerScheme) -> None:
    """Make a float layer a quantized one, in place: its class changes, its parameters stay.

    Args:
        layer: One of the float types in `QUANTIZED`.
        scheme: What to quantize; at least one of weight and input.
    """
    layer.__class__ = QUANTIZED[type(layer)]
    cast(QuantizedConvolution, layer).attach(scheme)


def unquantize_layer(layer: nn.Module) -> None:
    """Make a quantized layer the float one again, in place: its quantizers go, its parameters stay."""
    float_types = {quantized: plain for plain, quantized in QUANTIZED.items()}
    layer.__class__ = float_types[type(layer)]
    for name in ADDED:
        if hasattr(layer, name):
            delattr(layer, name)
