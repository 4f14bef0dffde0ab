"""The sparse layers: features (V, C), weight KRSC."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from cpq_train.quantization.layers.convolution import QuantizedConvolution
from cpq_train.quantization.numerics.exact_sum import Axes
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d
from cpq_train.sparse.rulebook import Rulebook


class _QuantizedSparseConvolution(QuantizedConvolution):
    """The sparse layers: features (V, C), weight KRSC."""

    axes = Axes(output=0, input=-1)

    convolve: Callable[..., SparseConvTensor]
    find_rulebook: Callable[[SparseConvTensor], Rulebook | None]

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        """Sparse tensor in, sparse tensor out."""
        if not self.rounds(input.features):
            return cast(SparseConvTensor, super().forward(input))
        # Found once, so that the parts of a split sum share it without an indice key too.
        rulebook = self.find_rulebook(input)
        outputs: list[SparseConvTensor] = []

        def convolve(x: Tensor, weight: Tensor) -> Tensor:
            outputs.append(self.convolve(input.replace_feature(x), weight, rulebook))
            return cast(Tensor, outputs[-1].features)

        features = self.quantized(input.features, convolve)
        return outputs[-1].replace_feature(features)


class QuantSubMConv3d(_QuantizedSparseConvolution, SubMConv3d):
    """SubMConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SubMConv3d"


class QuantSparseConv3d(_QuantizedSparseConvolution, SparseConv3d):
    """SparseConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SparseConv3d"


class QuantSparseInverseConv3d(_QuantizedSparseConvolution, SparseInverseConv3d):
    """SparseInverseConv3d with a quantized weight (axis 0 of KRSC) and input."""

    kind = "SparseInverseConv3d"
