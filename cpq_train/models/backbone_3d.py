"""The sparse backbone: four residual stages, and its map seen from above.

Letters: V active voxels, C channels, B batch, D H W cells along z, y, x. Structure and state-dict names are
those of OpenPCDet's VoxelResBackBone8x.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from cpq_train.models.config import BN_EPS
from cpq_train.sparse import (
    ResidualAdd,
    SparseConv3d,
    SparseConvTensor,
    SparseModule,
    SparseSequential,
    SubMConv3d,
)


class SparseBasicBlock(SparseModule):
    """Residual block relu(bn2(conv2(relu(bn1(conv1(x))))) + x) on the voxels of x.

    Both convolutions have a bias although a BatchNorm follows: published checkpoints hold them.

    Args:
        channels: input and output channels.
        indice_key: rulebook shared by the convolutions of one stage.
        bn_momentum: momentum of the running statistics.
    """

    def __init__(self, channels: int, indice_key: str, bn_momentum: float) -> None:
        super().__init__()
        conv = partial(SubMConv3d, channels, channels, 3, padding=1, bias=True, indice_key=indice_key)
        norm = partial(nn.BatchNorm1d, channels, eps=BN_EPS, momentum=bn_momentum)
        # This order is a contract: each convolution is directly followed by the BatchNorm that folds into it.
        self.conv1 = conv()
        self.bn1 = norm()
        self.relu = nn.ReLU()
        self.conv2 = conv()
        self.bn2 = norm()
        self.quant_add = ResidualAdd()

    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        """Runs the block.

        Args:
            x: sparse tensor with features (V, C). conv1 and the sum get the same tensor object `x.features`.

        Returns:
            Sparse tensor on the same voxels with features (V, C).
        """
        if x.features.shape[0] == 0:
            return x  # BatchNorm takes no empty input while training
        out = self.conv1(x)
        out = out.replace_feature(self.relu(self.bn1(out.features)))
        out = self.conv2(out)
        return out.replace_feature(self.relu(self.quant_add(self.bn2(out.features), x.features)))


def _strided(
    channels_in: int,
    channels_out: int,
    bn_momentum: float,
    indice_key: str,
    kernel_size: int | tuple[int, int, int] = 3,
    stride: int | tuple[int, int, int] = 2,
    padding: int | tuple[int, int, int] = 1,
) -> SparseSequential:
    """Strided sparse convolution, BatchNorm, ReLU."""
    return SparseSequential(
        SparseConv3d(
            channels_in,
            channels_out,
            kernel_size,
            stride=stride,
            padding=padding,
            bias=False,
            indice_key=indice_key,
        ),
        nn.BatchNorm1d(channels_out, eps=BN_EPS, momentum=bn_momentum),
        nn.ReLU(),
    )


class VoxelResBackBone8x(nn.Module):
    """Sparse residual backbone with stride 8 along x and y.

    Args:
        num_point_features: features of an input voxel.
        grid_size: number of voxels along x, y, z.
        channels: channels of the four stages.
        num_blocks: residual blocks of the four stages.
        out_channels: channels of the last convolution.
        bn_momentum: momentum of the running statistics.
    """

    def __init__(
        self,
        num_point_features: int,
        grid_size: tuple[int, int, int],
        channels: Sequence[int] = (16, 32, 64, 128),
        num_blocks: Sequence[int] = (2, 2, 2, 2),
        out_channels: int = 128,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        x, y, z = grid_size
        self.sparse_shape = [z + 1, y, x]
        # OpenPCDet gives conv_input a rulebook of its own, equal to that of the first stage; here they share
        # it. Keys are not saved, and the result is the same bit for bit.
        self.conv_input = SparseSequential(
            SubMConv3d(num_point_features, channels[0], 3, padding=1, bias=False, indice_key="res1"),
            nn.BatchNorm1d(channels[0], eps=BN_EPS, momentum=bn_momentum),
            nn.ReLU(),
        )

        def blocks(stage: int) -> list[SparseBasicBlock]:
            return [
                SparseBasicBlock(channels[stage - 1], f"res{stage}", bn_momentum)
                for _ in range(num_blocks[stage - 1])
            ]

        strided = partial(_strided, bn_momentum=bn_momentum)
        self.conv1 = SparseSequential(*blocks(1))
        self.conv2 = SparseSequential(strided(*channels[0:2], indice_key="spconv2"), *blocks(2))
        self.conv3 = SparseSequential(strided(*channels[1:3], indice_key="spconv3"), *blocks(3))
        self.conv4 = SparseSequential(
            strided(*channels[2:4], indice_key="spconv4", padding=(0, 1, 1)), *blocks(4)
        )
        self.conv_out = strided(
            channels[3],
            out_channels,
            indice_key="spconv_down2",
            kernel_size=(3, 1, 1),
            stride=(2, 1, 1),
            padding=0,
        )

    @property
    def output_depth(self) -> int:
        """Cells along z behind the last convolution (2 for nuScenes)."""
        depth = self.sparse_shape[0]
        for padding in (1, 1, 0, 0):
            depth = (depth + 2 * padding - 3) // 2 + 1
        return depth

    def forward(
        self, voxel_features_VC: Tensor, voxel_coords_V4: Tensor, batch_size: int
    ) -> SparseConvTensor:
        """Runs the backbone.

        Args:
            voxel_features_VC: mean features of each voxel, (V, C) float.
            voxel_coords_V4: batch, z, y, x of each voxel, (V, 4) int32.
            batch_size: number of samples; one without voxels is fine.

        Returns:
            Sparse tensor on the grid (output_depth, H, W).
        """
        x = SparseConvTensor(voxel_features_VC, voxel_coords_V4.int(), self.sparse_shape, batch_size)
        for stage in (self.conv_input, self.conv1, self.conv2, self.conv3, self.conv4, self.conv_out):
            x = stage(x)
        return x


class HeightCompression(nn.Module):
    """Turns the sparse volume into a dense BEV map, height stacked into the channels."""

    def forward(self, x: SparseConvTensor) -> Tensor:
        """Scatters the voxels.

        Args:
            x: sparse tensor with features (V, C) on the grid (D, H, W).

        Returns:
            Map (B, C * D, H, W) in channels_last memory; channel = c * D + z; zero where no voxel is.
        """
        depth, height, width = x.spatial_shape
        channels = x.features.shape[1]
        bev_BHWCD: Tensor = x.features.new_zeros((x.batch_size, height, width, channels, depth))
        batch, z, y, column = x.indices.long().unbind(1)
        bev_BHWCD[batch, y, column, :, z] = x.features
        return bev_BHWCD.flatten(3).permute(0, 3, 1, 2)
