"""The sparse layers: features (V, C), weight KRSC."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cpq_train.common.kernels import HAS_VNNI
from cpq_train.quantization.layers.convolution import QuantizedConvolution, RoundedWeight
from cpq_train.quantization.layers.integer_convolution import Convolution
from cpq_train.quantization.numerics.coded import Coded
from cpq_train.quantization.numerics.dense_convolution import Backward, Gradients
from cpq_train.quantization.numerics.exact_sum import Axes, Sums
from cpq_train.quantization.numerics.one_pass import rounded
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d, codes
from cpq_train.sparse.rulebook import Rulebook, lists_of

if TYPE_CHECKING:
    from cpq_train.sparse.kernels.convolutions import PairLists


@dataclass
class _AtVoxels:
    """The convolution of a sparse layer at the voxels of one input.

    Attributes:
        layer: The layer.
        x: The input, without its features: they would be kept for backward, which has their codes.
        rulebook: Found once, so that the parts of a split sum share it without an indice key too.
        state: What spconv's kernels need for backward of their last pass.
    """

    layer: _QuantizedSparseConvolution
    x: SparseConvTensor
    rulebook: Rulebook | None
    state: Any = None

    def __call__(self, features: Tensor, weight: Tensor) -> Tensor:
        """(V, C) -> (V', C')."""
        x = self.x.replace_feature(features)
        return cast(Tensor, self.layer.convolve(x, weight, self.rulebook).features)

    def of_codes(self, features: Tensor, weight: Tensor) -> Tensor:
        """The same of codes, without a gradient."""
        if self.rulebook is None or self.lists is not None or features.dtype != torch.float32:
            return self(features, weight)
        parts = features.contiguous(), weight.contiguous()
        sums, self.state = codes.convolve(*parts, self.rulebook, self.layer.inverse)
        return sums

    @property
    def lists(self) -> PairLists | None:
        """For our kernels; None where spconv's compute."""
        return lists_of(self.rulebook, self.layer.inverse)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The pairs of rows."""
        return () if self.lists is None else (self.lists.rows_in, self.lists.rows_out)

    def gradients(self, of: Backward) -> Gradients:
        """In fp32, whatever the type: see `integer_convolution.Convolution`."""
        grad, x, weight = of.grad, of.x, of.weight
        needs_x, needs_w, needs_bias = of.needed
        grad_bias = grad.sum(0) if needs_bias else None
        if (lists := self.lists) is not None:
            from cpq_train.sparse.kernels import convolutions  # Numba, whose import takes a second

            grad_x = convolutions.input_gradient(grad, weight, lists) if needs_x else None
            grad_w = convolutions.weight_gradient(x.float(), grad, lists).view_as(weight) if needs_w else None
        elif self.rulebook is None:  # each voxel meets itself
            grad_x = grad @ weight.flatten(1) if needs_x else None
            grad_w = (grad.T @ x.float()).view_as(weight) if needs_w else None
        else:
            both = codes.gradients(grad, x.float(), weight, self.rulebook, self.layer.inverse, self.state)
            grad_x, grad_w = both if needs_x else (None, both[1])
        return grad_x, grad_w, grad_bias


class _QuantizedSparseConvolution(QuantizedConvolution):
    """The sparse layers: features (V, C), weight KRSC."""

    axes = Axes(output=0, input=-1, feature=-1)

    inverse: bool
    convolve: Callable[..., SparseConvTensor]
    place: Callable[..., SparseConvTensor]
    find_rulebook: Callable[[SparseConvTensor], Rulebook | None]

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        """Sparse tensor in, sparse tensor out."""
        if not self.rounds(input.features):
            return cast(SparseConvTensor, super().forward(input))
        voxels = input.replace_feature(input.features.new_empty((0, 0)))
        at_voxels = _AtVoxels(self, voxels, self.find_rulebook(input))
        features = self.quantized(input.features, at_voxels)
        return self.place(input, features, at_voxels.rulebook)

    def _sums(self, x: Coded, x_codes: Tensor, weight: RoundedWeight, convolution: Convolution) -> Sums:
        assert isinstance(convolution, _AtVoxels)
        lists = convolution.lists
        if lists is None or x_codes.dtype != torch.uint8 or not self._fits_kernel(weight.codes):
            return super()._sums(x, x_codes, weight, convolution)
        from cpq_train.sparse.kernels import convolutions  # Numba, whose import takes a second

        packed = self._made_of_weight("packed", lambda: convolutions.packed(weight.codes))
        return Sums(rounded(convolutions.convolve_codes(x_codes, packed, lists), weight.bias.codes))

    def _fits_kernel(self, w_codes: Tensor) -> bool:
        """Whether sums of bytes fit into 32 bits, on a processor that multiplies them."""
        x_format, w_format = self._formats()
        largest = w_codes[0].numel() * x_format.qmax * w_format.largest_magnitude
        return HAS_VNNI and w_format.bits <= 8 and largest < 2**31


class QuantSubMConv3d(_QuantizedSparseConvolution, SubMConv3d):
    """SubMConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SubMConv3d"


class QuantSparseConv3d(_QuantizedSparseConvolution, SparseConv3d):
    """SparseConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SparseConv3d"


class QuantSparseInverseConv3d(_QuantizedSparseConvolution, SparseInverseConv3d):
    """SparseInverseConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SparseInverseConv3d"
