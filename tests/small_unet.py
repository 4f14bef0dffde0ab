"""A segmentation U-Net as one writes it with spconv, for the CPU.

Pairs of strided and inverse convolutions, pooling, 1x1x1 kernels, layers that share an indice key, and one
without.
"""

from __future__ import annotations

import torch
from spconv import pytorch as spconv
from spconv.core import ConvAlgo
from spconv.pytorch import SparseConvTensor
from torch import Tensor, nn

GRID = [9, 12, 10]
NATIVE = ConvAlgo.Native


def _with_relu(convolution: nn.Module) -> spconv.SparseSequential:
    return spconv.SparseSequential(convolution, nn.BatchNorm1d(convolution.out_channels), nn.ReLU())


def _subm(num_in: int, num_out: int, key: str | None, size: int = 3, **more: object) -> nn.Module:
    return spconv.SubMConv3d(num_in, num_out, size, indice_key=key, bias=False, algo=NATIVE, **more)


class SmallUNet(nn.Module):
    """(V, 4) features -> (V, 3) logits of the same voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = _with_relu(_subm(4, 8, "subm0", padding=1))
        self.down = _with_relu(
            spconv.SparseConv3d(8, 12, 3, stride=2, padding=1, bias=False, indice_key="down", algo=NATIVE)
        )
        self.level1 = _with_relu(_subm(12, 12, None, padding=1))
        self.pool = spconv.SparseMaxPool3d(2, 2, indice_key="pool", algo=NATIVE)
        self.level2 = _with_relu(_subm(12, 10, "subm2", padding=1))
        self.unpool = _with_relu(spconv.SparseInverseConv3d(10, 12, 2, "pool", bias=False, algo=NATIVE))
        self.mix = _with_relu(_subm(24, 12, "subm1", size=1))
        self.up = _with_relu(spconv.SparseInverseConv3d(12, 8, 3, "down", bias=False, algo=NATIVE))
        self.leave = _with_relu(_subm(16, 8, "subm0"))
        self.classify = spconv.SubMConv3d(8, 3, 1, algo=NATIVE)

    def forward(self, features: Tensor, indices: Tensor, batch_size: int) -> Tensor:
        """Logits of every voxel."""
        x0 = self.enter(SparseConvTensor(features, indices, GRID, batch_size))
        x1 = self.level1(self.down(x0))
        x2 = self.level2(self.pool(x1))
        x1 = self.mix(_beside(self.unpool(x2), x1))
        x0 = self.leave(_beside(self.up(x1), x0))
        return self.classify(x0).features


def _beside(x: SparseConvTensor, skipped: SparseConvTensor) -> SparseConvTensor:
    return x.replace_feature(torch.cat([x.features, skipped.features], 1))


def unet_inputs(seed: int = 0, batch_size: int = 2) -> tuple[Tensor, Tensor, int]:
    """Random voxels, in random order."""
    generator = torch.Generator().manual_seed(seed)
    taken = torch.rand((batch_size, *GRID), generator=generator) < 0.1
    indices = taken.nonzero().int().contiguous()
    indices = indices[torch.randperm(len(indices), generator=generator)]
    return torch.randn((len(indices), 4), generator=generator), indices, batch_size
