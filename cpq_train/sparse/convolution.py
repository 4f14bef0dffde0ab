"""Sparse 3-D convolutions on spconv 2: one interface for CPU and CUDA, train and eval.

Letters: V active voxels, C channels. Weights are KRSC: (C_out, kz, ky, kx, C_in), output channels on axis 0.

Traps of spconv 2.3.6 that end here:

* its own forward fuses the bias when `training` is off, which Native refuses on the CPU: here the bias is
  always added in torch, so that train and eval are one path;
* the algorithm is fixed when a layer is built, before its device is known: here it follows the features,
  Native on the CPU and MaskImplicitGemm on CUDA;
* autocast casts inside the kernels: here it is off around them, so that a sum keeps the dtype of the weight;
* voxel coordinates that are not contiguous (a `nonzero()`) are misread in silence: here they are copied.
"""

from __future__ import annotations

import torch
from spconv import pytorch as spconv
from spconv.pytorch import SparseConvTensor
from torch import Tensor

from cpq_train.sparse.rulebook import find_or_build, gather_multiply_scatter, output_shape


class _ConvolveMixin:
    """`convolve` and `forward` shared by both kinds of convolution; the rest is spconv's layer."""

    weight: Tensor
    bias: Tensor | None
    indice_key: str | None
    subm: bool

    def convolve(self, x: SparseConvTensor, weight: Tensor) -> SparseConvTensor:
        """Convolves with a given weight in place of the layer's own, without a bias.

        Args:
            x: sparse tensor with features (V_in, C_in).
            weight: KRSC weight (C_out, kz, ky, kx, C_in). Its channel counts may differ from the layer's, so
                that a sum can be split over slices of channels; calls with one `x` share the row order.

        Returns:
            Sparse tensor with features (V_out, C_out) in the dtype of `weight`, differentiable in both
            arguments. A submanifold layer keeps the voxels of `x`; a strided one has a voxel wherever its
            window meets at least one.
        """
        if x.features.shape[0] == 0:
            return _convolve_nothing(self, x, weight)
        rulebook = find_or_build(self, x)
        with torch.autocast(x.features.device.type, enabled=False):
            features = gather_multiply_scatter(
                x.features.to(weight.dtype).contiguous(), weight.contiguous(), rulebook
            )
        out = x.replace_feature(features)
        if not self.subm:
            out.indices = rulebook.out_indices
            out.spatial_shape = rulebook.out_spatial_shape
        return out

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Convolves with the layer's own weight and adds its bias, if it has one.

        Args:
            x: sparse tensor with features (V_in, C_in).

        Returns:
            Sparse tensor with features (V_out, C_out).
        """
        out = self.convolve(x, self.weight)
        return out if self.bias is None else out.replace_feature(out.features + self.bias)


class SubMConv3d(_ConvolveMixin, spconv.SubMConv3d):
    """Submanifold convolution: output voxels are the input voxels. Arguments as spconv's class."""


class SparseConv3d(_ConvolveMixin, spconv.SparseConv3d):
    """Strided sparse convolution. Arguments as spconv's class."""


def _convolve_nothing(layer: _ConvolveMixin, x: SparseConvTensor, weight: Tensor) -> SparseConvTensor:
    """No voxel in, none out; spconv's kernels do not take that case."""
    # The product keeps the weight in the graph, so that its gradient is zero and not missing.
    out = x.replace_feature(x.features.new_zeros((0, weight.shape[0]), dtype=weight.dtype) * weight.sum())
    out.spatial_shape = output_shape(layer, x.spatial_shape)
    return out
