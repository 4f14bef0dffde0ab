"""Sparse 3-D convolutions on spconv 2: one interface for CPU and CUDA, train and eval.

Letters: V active voxels, C channels. Weights are KRSC: (C_out, kz, ky, kx, C_in), output channels on axis 0.

Traps of spconv 2.3.6 that end here:

* its own forward fuses the bias when `training` is off, which Native refuses on the CPU: here the bias is
  always added in torch, so that train and eval are one path;
* the algorithm is fixed when a layer is built, before its device is known: here it follows the features,
  Native on the CPU and MaskImplicitGemm on CUDA;
* autocast casts inside the kernels: here it is off around them, so that a sum keeps the dtype of the weight;
* voxel coordinates that are not contiguous (a `nonzero()`) are misread in silence: here they are copied;
* the weight of a 1x1x1 kernel (stride 1) is read as (C_in, C_out), unlike any other: here it is KRSC too, and
  only state dicts have it as spconv does, so that they fit the networks of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from spconv import pytorch as spconv
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from cpq_train.sparse.products import product
from cpq_train.sparse.rulebook import Rulebook, find_or_build, gather_multiply_scatter


class _ConvolveMixin(SparseConvolution):
    """What the kinds of convolution share; the rest is spconv's layer."""

    weight: Tensor
    bias: Tensor | None
    indice_key: str | None
    subm: bool
    inverse: bool
    conv1x1: bool

    def find_rulebook(self, x: SparseConvTensor) -> Rulebook | None:
        """Which voxel meets which; None where each only meets itself, as in spconv's 1x1x1 kernels.

        Raises:
            UserError: The layer's indice key belongs to another kernel or other voxels, or nothing was left
                under that of an inverse convolution.
        """
        return None if self.conv1x1 else find_or_build(self, x)

    def convolve(
        self, x: SparseConvTensor, weight: Tensor, rulebook: Rulebook | None = None
    ) -> SparseConvTensor:
        """Convolves with a given weight in place of the layer's own, without a bias.

        Args:
            x: sparse tensor with features (V_in, C_in).
            weight: KRSC weight (C_out, kz, ky, kx, C_in). Its channel counts may differ from the layer's, so
                that a sum can be split over slices of channels.
            rulebook: what `find_rulebook` said of `x`. Calls with one rulebook, or with one `x` if the layer
                has an indice key, share the row order.

        Returns:
            Sparse tensor with features (V_out, C_out) in the dtype of `weight`, differentiable in both
            arguments. A submanifold layer keeps the voxels of `x`; a strided one has a voxel wherever its
            window meets at least one; an inverse one has the voxels that the layer which it undoes had read.

        Raises:
            UserError: As `find_rulebook`.
        """
        with torch.autocast(x.features.device.type, enabled=False):
            features = x.features.to(weight.dtype).contiguous()
            if self.conv1x1:
                return x.replace_feature(product(features, weight[:, 0, 0, 0]))
            rulebook = rulebook or find_or_build(self, x)
            out = gather_multiply_scatter(features, weight.contiguous(), rulebook, self.inverse)
        return self.place(x, out, rulebook)

    def place(self, x: SparseConvTensor, features: Tensor, rulebook: Rulebook | None) -> SparseConvTensor:
        """Features (V_out, C_out) at the output voxels of an input, whose rulebook is given."""
        out = x.replace_feature(features)
        if rulebook is None or (self.subm and not self.inverse):
            return out
        if self.inverse:
            out.indices, out.spatial_shape = rulebook.indices, rulebook.spatial_shape
        else:
            out.indices, out.spatial_shape = rulebook.out_indices, rulebook.out_spatial_shape
        return out

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        """Convolves with the layer's own weight and adds its bias, if it has one.

        Args:
            input: sparse tensor with features (V_in, C_in).

        Returns:
            Sparse tensor with features (V_out, C_out).

        Raises:
            UserError: As `find_rulebook`.
        """
        out = self.convolve(input, self.weight)
        return out if self.bias is None else out.replace_feature(out.features + self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight"
        if self.conv1x1 and key in destination:
            destination[key] = as_spconv_reads(destination[key])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *more: Any) -> None:
        key = prefix + "weight"
        if self.conv1x1 and key in state_dict and state_dict[key].shape == self.weight.shape:
            state_dict = {**state_dict, key: as_krsc(state_dict[key])}
        super()._load_from_state_dict(state_dict, prefix, *more)


class SubMConv3d(_ConvolveMixin, spconv.SubMConv3d):
    """Submanifold convolution: output voxels are the input voxels. Arguments as spconv's class."""


class SparseConv3d(_ConvolveMixin, spconv.SparseConv3d):
    """Strided sparse convolution. Arguments as spconv's class."""


class SparseInverseConv3d(_ConvolveMixin, spconv.SparseInverseConv3d):
    """Undoes the strided layer (or pooling) of its indice key. Arguments as spconv's class.

    A 1x1x1 kernel undoes nothing and keeps the voxels, as spconv's does.
    """


def as_spconv_reads(weight: Tensor) -> Tensor:
    """A 1x1x1 weight in KRSC, (C_out, 1, 1, 1, C_in), with its numbers in the order (C_in, C_out)."""
    return weight.flatten(1).T.reshape(weight.shape)


def as_krsc(weight: Tensor) -> Tensor:
    """The other way round."""
    return weight.reshape(weight.shape[-1], weight.shape[0]).T.reshape(weight.shape).contiguous()
