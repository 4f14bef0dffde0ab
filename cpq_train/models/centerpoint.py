"""CenterPoint-Voxel: sparse backbone, BEV map, BEV backbone, centre head.

Letters: V active voxels, C channels, B batch, H W rows and columns of the head's map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.models.backbone_2d import BaseBEVBackbone
from cpq_train.models.backbone_3d import HeightCompression, VoxelResBackBone8x
from cpq_train.models.center_head import CenterHead, HeadOutput
from cpq_train.models.config import BevGeometry, NetworkConfig


class CenterPoint(nn.Module):
    """The float network. State-dict names, shapes and dtypes are those of OpenPCDet's detector.

    Initialisation is the published one: PyTorch's and spconv's defaults, except for the branches of the head.

    Args:
        config: sizes; None means `NetworkConfig()`, the nuScenes network at 0.1 m.
        **fields: single fields of `NetworkConfig`, which override `config`.

    Raises:
        UserError: a field is unknown or the grid does not work out.
    """

    def __init__(self, config: NetworkConfig | None = None, **fields: Any) -> None:
        super().__init__()
        config = _with_fields(config or NetworkConfig(), fields)
        self.config = config
        self.backbone_3d = VoxelResBackBone8x(
            config.num_point_features,
            config.grid_size,
            config.backbone_3d_channels,
            config.backbone_3d_num_blocks,
            config.backbone_3d_out_channels,
            config.backbone_bn_momentum,
        )
        self.map_to_bev_module = HeightCompression()
        self.backbone_2d = BaseBEVBackbone(
            _bev_channels(self.backbone_3d, config),
            config.backbone_2d_num_layers,
            config.backbone_2d_channels,
            config.backbone_2d_strides,
            config.upsample_strides,
            config.upsample_channels,
            config.backbone_bn_momentum,
        )
        group_sizes = [len(group) for group in config.class_groups]
        self.dense_head = CenterHead(self.backbone_2d.out_channels, config.head_channels, group_sizes)
        self.register_load_state_dict_pre_hook(_drop_global_step)

    @property
    def geometry(self) -> BevGeometry:
        """The map of the head, for targets and decoding."""
        return self.config.geometry

    def dense_channels_last(self) -> None:
        """Store the dense layers' weights as channels_last, which is faster on CPU and GPU."""
        for dense in (self.backbone_2d, self.dense_head):
            dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def example_input(self) -> tuple[Tensor, Tensor, int]:
        """Arguments of `forward`: one sample of a few voxels, which reach every layer."""
        x, y, z = self.config.grid_size
        cells = torch.cartesian_prod(*(torch.arange(n // 2, n // 2 + 3) for n in (z, y, x)))
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(len(cells), self.config.num_point_features, generator=generator)
        device = next(self.parameters()).device
        coords = torch.cat([torch.zeros(len(cells), 1), cells], 1).int()
        return features.to(device), coords.to(device), 1

    def forward(
        self, voxel_features_VC: Tensor, voxel_coords_V4: Tensor, batch_size: int
    ) -> list[HeadOutput]:
        """Runs the network.

        Args:
            voxel_features_VC: mean features of each voxel, (V, C) float32.
            voxel_coords_V4: batch, z, y, x of each voxel, (V, 4) int32.
            batch_size: number of samples; one without voxels is fine.

        Returns:
            Raw outputs of each class group, see `center_head.BOX_BRANCHES`: center, center_z, dim, rot, vel,
            hm, each (B, channels, H, W).
        """
        volume = self.backbone_3d(voxel_features_VC, voxel_coords_V4, batch_size)
        bev_BCHW = self.map_to_bev_module(volume)
        heads: list[HeadOutput] = self.dense_head(self.backbone_2d(bev_BCHW))
        return heads


def _with_fields(config: NetworkConfig, fields: dict[str, Any]) -> NetworkConfig:
    unknown = sorted(set(fields) - set(NetworkConfig.__dataclass_fields__))
    if unknown:
        accepted = ", ".join(NetworkConfig.__dataclass_fields__)
        raise UserError(f"unknown network field {', '.join(unknown)}: accepted are {accepted}")
    return replace(config, **fields)


def _bev_channels(backbone: VoxelResBackBone8x, config: NetworkConfig) -> int:
    depth = backbone.output_depth
    if depth < 1:
        num_voxels = config.grid_size[2]
        raise UserError(
            f"{num_voxels} voxels along z leave none behind the sparse backbone: expected 24 or more"
        )
    return config.backbone_3d_out_channels * depth


def _drop_global_step(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """OpenPCDet counts steps in a buffer of the detector: accepted in a file, and not used."""
    state_dict.pop(f"{prefix}global_step", None)
