"""Quantized layers, trained in the arithmetic that is deployed.

A layer whose weight and input both have integer codes is an integer convolution times a scale per channel,
and is computed so:

    acc = conv(codes_x, codes_w);    y = acc * (step_x * step_w);    y = y + bias

While every partial sum stays a whole number below 2^24 the fp32 result does not depend on the order of
summation, the kernel or the device. A layer knows its bound, the largest sum of |code_w| * max|code_x| over
an output channel; where it passes 2^24 the sum is split over the input channels and the parts are added in
fp64.

Every class extends the float layer it replaces and takes over the float module in place (`quantize_layer`),
so names, parameters and shapes stay what they were. Gradients are those of pytorch-quantization's QuantConv
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cpq_train.quantization import int8_kernel
from cpq_train.quantization.dense import IntegerConvolution
from cpq_train.quantization.fake_quant import add_codes, rescale
from cpq_train.quantization.int8_kernel import Geometry
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.scheme import OUTPUT_CHANNEL_AXIS, LayerScheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SubMConv3d

EXACT_LIMIT = 2.0**24
"""fp32 holds every whole number up to here."""


Convolve: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class QuantizedConvolution(nn.Module):
    """What the four quantized convolutions share; mixed in before the float layer.

    `_input_quantizer` and `_weight_quantizer` are None where that tensor stays float.
    """

    kind: ClassVar[str]
    input_channel_dim: ClassVar[int]
    feature_channel_dim: ClassVar[int] = 1

    weight: Any
    bias: Any
    _input_quantizer: Quantizer | None
    _weight_quantizer: Quantizer | None
    is_integer: bool

    def attach(self, scheme: LayerScheme) -> None:
        """Create the quantizers; the weight's range is known at once."""
        self.is_integer = scheme.arithmetic == "integer"
        self._input_quantizer = None if scheme.input.is_off else Quantizer(scheme.input)
        self._weight_quantizer = None
        if not scheme.weight.is_off:
            axis = OUTPUT_CHANNEL_AXIS[self.kind] if scheme.weight.granularity == "per_channel" else None
            channels = 1 if axis is None else self.weight.shape[axis]
            self._weight_quantizer = Quantizer(scheme.weight, axis, channels, self.weight.dim())
            self._weight_quantizer.set_amax_from(self.weight)

    def rounds(self, x: Tensor) -> bool:
        """Whether anything is rounded now; feeds the input's calibrator while it is collecting."""
        if self._input_quantizer is not None and self._input_quantizer._if_calib:
            self._input_quantizer.collect(x)
        return any(q is not None and q.is_active for q in (self._input_quantizer, self._weight_quantizer))

    def quantized(self, x: Tensor, convolve: Convolve) -> Tensor:
        """The layer's output, bias included.

        Args:
            x: Features.
            convolve: The convolution of features with a weight, without bias; linear in both.
        """
        pair = (self._input_quantizer, self._weight_quantizer)
        is_integer = self.is_integer and all(q is not None and q.is_active for q in pair)
        with torch.autocast(x.device.type, enabled=False):  # codes and their sums need fp32
            return self._integer(x.float(), convolve) if is_integer else self._simulated(x, convolve)

    def _simulated(self, x: Tensor, convolve: Convolve) -> Tensor:
        x = x.float() if self._input_quantizer is None else self._input_quantizer(x)
        weight = self.weight if self._weight_quantizer is None else self._weight_quantizer(self.weight)
        out = convolve(x, weight)
        return out if self.bias is None else out + self._per_channel(self.bias, out)

    def _integer(self, x: Tensor, convolve: Convolve) -> Tensor:
        assert self._input_quantizer is not None
        assert self._weight_quantizer is not None
        x_codes, step_x = self._input_quantizer.codes(x)
        w_codes, step_w = self._weight_quantizer.codes(self.weight, step_x)
        acc = self._exact_sum(x_codes, w_codes, convolve)
        return rescale(acc, step_x, step_w, self.bias, self.feature_channel_dim)

    def _exact_sum(self, x_codes: Tensor, w_codes: Tensor, convolve: Convolve) -> Tensor:
        num_parts = self._num_parts(w_codes)
        if num_parts > 1 and x_codes.numel() and float(x_codes.detach().amin()) >= 0:
            num_parts = self._num_parts(w_codes, one_sided=True)
        if num_parts == 1:
            return convolve(x_codes, w_codes)
        parts = zip(
            x_codes.chunk(num_parts, self.feature_channel_dim),
            w_codes.chunk(num_parts, self.input_channel_dim),
            strict=True,
        )
        total = torch.stack([convolve(x, w).double() for x, w in parts]).sum(0)
        return total.float()

    def _num_parts(self, w_codes: Tensor, one_sided: bool = False) -> int:
        """Into how many groups of input channels the sum must be split to stay below 2^24.

        Args:
            w_codes: Codes of the weight.
            one_sided: The input has no negative code (it comes from a ReLU). Then positive and negative
                products never add up, and the bound is about half as large.
        """
        input_format = cast(Quantizer, self._input_quantizer).format
        largest_x = input_format.qmax if one_sided else input_format.largest_magnitude
        largest_w = cast(Quantizer, self._weight_quantizer).format.largest_magnitude
        output_axis = OUTPUT_CHANNEL_AXIS[self.kind]
        num_terms = w_codes.numel() // w_codes.shape[output_axis]
        if num_terms * largest_x * largest_w < EXACT_LIMIT:
            return 1
        per_channel = self._magnitudes(w_codes.detach(), one_sided)
        for num_parts in range(1, per_channel.shape[1] + 1):
            parts = per_channel.chunk(num_parts, 1)
            worst = max(float(part.sum(1).max()) for part in parts)
            if worst * largest_x < EXACT_LIMIT and len(parts) == num_parts:
                return num_parts
        raise AssertionError(
            "one input channel alone passes 2^24: bits this wide are computed as `simulated`"
        )

    def _magnitudes(self, w_codes: Tensor, one_sided: bool) -> Tensor:
        """Sums of |code_w| by output (rows) and input channel (columns); one-sided, by sign too."""
        output_axis, input_axis = OUTPUT_CHANNEL_AXIS[self.kind], self.input_channel_dim % w_codes.dim()
        kernel = [d for d in range(w_codes.dim()) if d not in (output_axis, input_axis)]
        signs = (w_codes.clamp(min=0), w_codes.clamp(max=0)) if one_sided else (w_codes,)
        sums = torch.cat([w.abs().sum(kernel) for w in signs], output_axis)
        return sums if output_axis == 0 else sums.T

    def _per_channel(self, values: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.feature_channel_dim] = -1
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
        convolution = IntegerConvolution(
            self._input_quantizer.range_of(x),
            None if self._input_quantizer.is_shared else self._input_quantizer.format,
            self._weight_quantizer.range_of(self.weight),
            self._weight_quantizer.format,
            lambda codes_x, codes_w: self._exact_sum(codes_x, codes_w, convolve),
            self._geometry(),
        )
        if self._input_quantizer.is_shared:
            x, _ = self._input_quantizer.codes(x)
        return convolution(x, self.weight, self.bias)

    def _exact_sum(self, x_codes: Tensor, w_codes: Tensor, convolve: Convolve) -> Tensor:
        x_format = cast(Quantizer, self._input_quantizer).format
        w_format = cast(Quantizer, self._weight_quantizer).format
        geometry = self._geometry()
        if int8_kernel.takes(x_codes, w_codes, x_format.qmax, w_format.largest_magnitude, geometry):
            return int8_kernel.convolve(x_codes, w_codes, geometry)
        return super()._exact_sum(x_codes, w_codes, convolve)

    def _geometry(self) -> Geometry:
        layer = cast(_ConvNd, self)
        padding = cast(tuple[int, ...], layer.padding)
        return Geometry(
            layer.stride, padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups
        )


class QuantConv2d(_QuantizedDenseConvolution, nn.Conv2d):
    """Conv2d with a quantized weight (axis 0) and input."""

    kind = "Conv2d"
    input_channel_dim = 1


class QuantConvTranspose2d(_QuantizedDenseConvolution, nn.ConvTranspose2d):  # type: ignore[misc]  # no output_size
    """ConvTranspose2d with a quantized weight (axis 1, the output channels) and input."""

    kind = "ConvTranspose2d"
    input_channel_dim = 0


class _QuantizedSparseConvolution(QuantizedConvolution):
    """The sparse layers: features (V, C), weight KRSC."""

    input_channel_dim = -1

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
    is_integer = True

    _input_quantizer: Quantizer
    _residual_quantizer: Quantizer | None

    def attach(self, scheme: LayerScheme) -> None:
        """Create the quantizer."""
        self._input_quantizer = Quantizer(scheme.input)
        self._residual_quantizer = None

    def forward(self, branch: Tensor, identity: Tensor) -> Tensor:
        """(V, C) + (V, C)."""
        residual = self._residual_quantizer or self._input_quantizer
        pairs = ((self._input_quantizer, branch), (residual, identity))
        for quantizer, tensor in pairs:
            if quantizer._if_calib:
                quantizer.collect(tensor)
        if not self._input_quantizer.is_active:
            return super().forward(branch, identity)
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


def quantize_layer(layer: nn.Module, scheme: LayerScheme) -> None:
    """Make a float layer a quantized one, in place: its class changes, its parameters stay.

    Args:
        layer: One of the float types in `QUANTIZED`.
        scheme: What to quantize; at least one of weight and input.
    """
    layer.__class__ = QUANTIZED[type(layer)]
    cast(QuantizedConvolution, layer).attach(scheme)
