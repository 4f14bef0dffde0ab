"""Voxels of a small grid, and the grid itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpq_train.sparse import SparseConvTensor

SHAPE = (9, 12, 10)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def sparse_input(
    channels: int, device: str = "cpu", batch_size: int = 2, fraction: float = 0.1
) -> SparseConvTensor:
    """Random voxels of a small grid."""
    generator = torch.Generator().manual_seed(channels)
    occupied = torch.rand((batch_size, *SHAPE), generator=generator) < fraction
    coords = occupied.nonzero().int()
    features = torch.randn((len(coords), channels), generator=generator)
    return SparseConvTensor(features.to(device), coords.to(device), list(SHAPE), batch_size)


def grid_order(x: SparseConvTensor) -> Tensor:
    """Rows of the voxels in the order of their places in the grid."""
    return (x.indices.long().cpu() @ torch.tensor([8000, 400, 20, 1])).argsort()  # axes are shorter than 20


def dense(x: SparseConvTensor) -> Tensor:
    """The whole grid, (B, C, D, H, W)."""
    b, z, y, column = x.indices.long().unbind(1)
    grid = x.features.new_zeros((x.batch_size, *x.spatial_shape, x.features.shape[1]))
    return grid.index_put((b, z, y, column), x.features).permute(0, 4, 1, 2, 3)


def dense_reference(x: SparseConvTensor, weight: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    """Convolution of the dense grid, (B, C, D, H, W)."""
    return F.conv3d(dense(x), weight.permute(0, 4, 1, 2, 3), stride=stride, padding=padding)


def at_voxels(grid: Tensor, indices: Tensor) -> Tensor:
    b, z, y, x = indices.long().unbind(1)
    return grid[b, :, z, y, x]
