"""The centre head: one shared convolution, then six small branches for each group of classes.

Letters: B batch, C channels, H W rows and columns of the map. State-dict names are those of OpenPCDet's
CenterHead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

HeadOutput: TypeAlias = dict[str, Tensor]
"""Raw outputs of one class group by branch name, each (B, channels, H, W)."""

BOX_BRANCHES: dict[str, int] = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2}
"""Channels of the box branches, in the order in which the box code stacks them.

center: offset of the centre in its cell (x, y), cells. center_z: height of the centre, metres. dim: logarithm
of length, width, height, metres. rot: cosine, sine of the yaw. vel: velocity (x, y), metres per second.
"""

HEATMAP_PRIOR = -2.19
"""Initial logit of the heat map: probability 0.1, so that the first losses are not swamped by background."""


def branches_of(num_classes: int) -> dict[str, int]:
    """Channels of every branch of a class group, in the order of the network."""
    return {**BOX_BRANCHES, "hm": num_classes}


def box_codes(head: HeadOutput) -> Tensor:
    """The box branches as one map of box codes, (B, 10, H, W)."""
    return torch.cat([head[name] for name in BOX_BRANCHES], dim=1)


class SeparateHead(nn.Module):
    """The six branches of one class group: center, center_z, dim, rot, vel and the heat map hm.

    Args:
        channels: hidden channels.
        num_classes: classes of the group, the channels of hm.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.branches = branches_of(num_classes)
        for name, out_channels in self.branches.items():
            self.add_module(name, _branch(channels, out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal box branches with zero bias; PyTorch defaults and the prior for the heat map."""
        for name in BOX_BRANCHES:
            for layer in self.get_submodule(name).modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight)
                    assert layer.bias is not None
                    nn.init.zeros_(layer.bias)
        last = self.get_submodule("hm.1")
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.constant_(last.bias, HEATMAP_PRIOR)

    def forward(self, shared_BCHW: Tensor) -> HeadOutput:
        """Runs every branch on the same tensor.

        Args:
            shared_BCHW: output of the shared convolution, (B, C, H, W).

        Returns:
            Raw outputs by branch name: no sigmoid, no exponential.
        """
        return {name: self.get_submodule(name)(shared_BCHW) for name in self.branches}


def _conv_bn_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=True), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


def _branch(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_conv_bn_relu(channels, channels), nn.Conv2d(channels, out_channels, 3, padding=1))


class CenterHead(nn.Module):
    """Shared convolution and one `SeparateHead` for each class group.

    Args:
        in_channels: channels of the BEV features.
        channels: hidden channels.
        group_sizes: number of classes of each group.
    """

    def __init__(self, in_channels: int, channels: int, group_sizes: Sequence[int]) -> None:
        super().__init__()
        self.shared_conv = _conv_bn_relu(in_channels, channels)
        self.heads_list = nn.ModuleList(SeparateHead(channels, size) for size in group_sizes)

    def forward(self, features_BCHW: Tensor) -> list[HeadOutput]:
        """Runs the head.

        Args:
            features_BCHW: BEV features (B, in_channels, H, W).

        Returns:
            Raw outputs of each class group. All branches get one tensor object, so that quantization can give
            them one quantizer.
        """
        shared_BCHW = self.shared_conv(features_BCHW)
        return [head(shared_BCHW) for head in self.heads_list]
