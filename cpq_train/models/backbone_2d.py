"""The BEV backbone: a pyramid of plain convolutions, brought back to one scale.

Letters: B batch, C channels, H W rows and columns of the map. State-dict names are those of OpenPCDet's
BaseBEVBackbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cpq_train.models.config import BN_EPS


class Concatenation(nn.Module):
    """Joins maps along the channels; a module so that it can be measured like any layer."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, C_i, H, W) each -> (B, sum of C_i, H, W)."""
        return torch.cat(tuple(maps), dim=1)


class BaseBEVBackbone(nn.Module):
    """Levels of 3x3 convolutions; each level's output is upsampled to one scale and concatenated.

    Args:
        in_channels: channels of the BEV map.
        num_layers: convolutions of each level behind its first one.
        channels: channels of each level.
        strides: stride of each level's first convolution.
        upsample_strides: upsampling of each level.
        upsample_channels: channels of each level after upsampling.
        bn_momentum: momentum of the running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        num_layers: Sequence[int] = (5, 5),
        channels: Sequence[int] = (128, 256),
        strides: Sequence[int] = (1, 2),
        upsample_strides: Sequence[int] = (1, 2),
        upsample_channels: Sequence[int] = (256, 256),
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        level_inputs = (in_channels, *channels[:-1])
        self.blocks = nn.ModuleList(
            _level(*sizes, bn_momentum)
            for sizes in zip(level_inputs, channels, num_layers, strides, strict=True)
        )
        self.deblocks = nn.ModuleList(
            _upsampling(*sizes, bn_momentum)
            for sizes in zip(channels, upsample_channels, upsample_strides, strict=True)
        )
        self.concatenation = Concatenation()
        self.out_channels = sum(upsample_channels)

    def forward(self, bev_BCHW: Tensor) -> Tensor:
        """Runs the backbone.

        Args:
            bev_BCHW: BEV map (B, in_channels, H, W).

        Returns:
            Map (B, sum of upsample_channels, H', W') at the scale of the head.
        """
        maps = []
        x = bev_BCHW
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            maps.append(deblock(x))
        joined: Tensor = self.concatenation(maps)
        return joined


def _level(
    channels_in: int, channels_out: int, num_layers: int, stride: int, bn_momentum: float
) -> nn.Sequential:
    norm = partial(nn.BatchNorm2d, channels_out, eps=BN_EPS, momentum=bn_momentum)
    # Padding is a layer of its own because the names of published checkpoints count it.
    layers: list[nn.Module] = [
        nn.ZeroPad2d(1),
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, bias=False),
        norm(),
        nn.ReLU(),
    ]
    for _ in range(num_layers):
        layers += [nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False), norm(), nn.ReLU()]
    return nn.Sequential(*layers)


def _upsampling(channels_in: int, channels_out: int, stride: int, bn_momentum: float) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, channels_out, stride, stride=stride, bias=False),
        nn.BatchNorm2d(channels_out, eps=BN_EPS, momentum=bn_momentum),
        nn.ReLU(),
    )
