"""CenterPoint as OpenPCDet, tianweiy/CenterPoint and mmdetection3d would save and run it.

Independent of the code under test: names and conventions are written down once more, from the description of
each project, and the forward pass is plain torch on a dense grid (`conv3d` and a mask of active voxels),
straight from the tensors of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpq_train.models import NetworkConfig

Names = Callable[..., tuple[str, str]]

TINY = NetworkConfig(
    point_cloud_range=(-1.6, -1.6, -5.0, 1.6, 1.6, 3.0),
    backbone_3d_channels=(4, 8, 12, 16),
    backbone_3d_out_channels=16,
    backbone_2d_num_layers=(2, 1),
    backbone_2d_channels=(12, 16),
    upsample_channels=(20, 16),
    head_channels=8,
)
"""32 by 32 by 40 voxels; every pair of channels that an order of axes could confuse differs."""

TO_CONV3D = {"krsc": (0, 4, 1, 2, 3), "rsck": (4, 3, 0, 1, 2), "rskc": (3, 4, 0, 1, 2)}
"""Axes of a weight of the file as conv3d wants them: out, in, z, y, x."""

BRANCHES = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2, "hm": 0}


@dataclass
class Dialect:
    """How a project names layers: each function gives the names of a convolution and of its BatchNorm.

    Args:
        conv_input, conv_out: Without arguments.
        strided: Stage 2, 3, 4.
        block: Stage 1...4, block, convolution 1 or 2, number of blocks of the stage.
        bev: Level, convolution.
        deblock: Level.
        shared: Without arguments.
        hidden: Head, branch.
        last: Head, branch; the second name is empty.
        branches: Our name of a branch -> theirs.
        has_bias: Whether a convolution before a BatchNorm has a bias, where any project's has.
        conv_for_stride_1: Whether upsampling by 1 is a Conv2d.
    """

    conv_input: Names
    strided: Names
    block: Names
    conv_out: Names
    bev: Names
    deblock: Names
    shared: Names
    hidden: Names
    last: Names
    branches: dict[str, str] = field(default_factory=lambda: dict(zip(BRANCHES, BRANCHES, strict=True)))
    has_bias: bool = True
    conv_for_stride_1: bool = True


def _two(prefix: str, conv: Any = 0, norm: Any = 1) -> tuple[str, str]:
    return f"{prefix}.{conv}", f"{prefix}.{norm}"


OPENPCDET = Dialect(
    conv_input=lambda: _two("backbone_3d.conv_input"),
    strided=lambda n, _: _two(f"backbone_3d.conv{n}.0"),
    block=lambda n, b, k, _: _two(f"backbone_3d.conv{n}.{b if n == 1 else b + 1}", f"conv{k}", f"bn{k}"),
    conv_out=lambda: _two("backbone_3d.conv_out"),
    bev=lambda lv, i: _two(f"backbone_2d.blocks.{lv}", 1 + 3 * i, 2 + 3 * i),
    deblock=lambda lv: _two(f"backbone_2d.deblocks.{lv}"),
    shared=lambda: _two("dense_head.shared_conv"),
    hidden=lambda h, name: _two(f"dense_head.heads_list.{h}.{name}.0"),
    last=lambda h, name: (f"dense_head.heads_list.{h}.{name}.1", ""),
    conv_for_stride_1=False,
)
TIANWEIY = Dialect(
    conv_input=lambda: _two("backbone.conv_input"),
    strided=lambda n, _: _two(f"backbone.conv{n}"),
    block=lambda n, b, k, _: _two(f"backbone.conv{n}.{b if n == 1 else b + 3}", f"conv{k}", f"bn{k}"),
    conv_out=lambda: _two("backbone.extra_conv"),
    bev=lambda lv, i: _two(f"neck.blocks.{lv}", 1 + 3 * i, 2 + 3 * i),
    deblock=lambda lv: _two(f"neck.deblocks.{lv}"),
    shared=lambda: _two("bbox_head.shared_conv"),
    hidden=lambda h, name: _two(f"bbox_head.tasks.{h}.{name}"),
    last=lambda h, name: (f"bbox_head.tasks.{h}.{name}.3", ""),
    branches={"center": "reg", "center_z": "height", "dim": "dim", "rot": "rot", "vel": "vel", "hm": "hm"},
)
_LAYERS = "pts_middle_encoder.encoder_layers.encoder_layer"
MMDET3D = Dialect(
    conv_input=lambda: _two("pts_middle_encoder.conv_input"),
    strided=lambda n, num_blocks: _two(f"{_LAYERS}{n - 1}.{num_blocks}"),
    block=lambda n, b, k, _: _two(f"{_LAYERS}{n}.{b}", f"conv{k}", f"bn{k}"),
    conv_out=lambda: _two("pts_middle_encoder.conv_out"),
    bev=lambda lv, i: _two(f"pts_backbone.blocks.{lv}", 3 * i, 3 * i + 1),
    deblock=lambda lv: _two(f"pts_neck.deblocks.{lv}"),
    shared=lambda: _two("pts_bbox_head.shared_conv", "conv", "bn"),
    hidden=lambda h, name: _two(f"pts_bbox_head.task_heads.{h}.{name}.0", "conv", "bn"),
    last=lambda h, name: (f"pts_bbox_head.task_heads.{h}.{name}.1", ""),
    branches={**TIANWEIY.branches, "hm": "heatmap"},
    has_bias=False,
)


@dataclass
class ForeignNetwork:
    """A network of another project: its layers are made when they are first run, from a seed.

    Args:
        dialect: Names and layers of the project.
        layout: Axes of the sparse weights.
        config: Sizes, in our words.
        state: Tensors of the file, under the project's names.
    """

    dialect: Dialect
    layout: str
    config: NetworkConfig = TINY
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(3)

    def tensor(self, name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """The tensor of this name, made if it is not there yet."""
        if name not in self.state:
            uniform = torch.rand(shape, generator=self._generator)
            self.state[name] = low + (high - low) * uniform
        assert self.state[name].shape == shape, name
        return self.state[name]

    def weight(self, name: str, fan_in: int, *shape: int) -> Tensor:
        bound = math.sqrt(3 / fan_in)
        return self.tensor(f"{name}.weight", *shape, low=-bound, high=bound)

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        """BatchNorm with running statistics."""
        channels = x.shape[1]
        scale = self.tensor(f"{name}.weight", channels, low=0.5, high=1.5)
        shift = self.tensor(f"{name}.bias", channels)
        mean = self.tensor(f"{name}.running_mean", channels)
        variance = self.tensor(f"{name}.running_var", channels, low=0.5, high=1.5)
        self.state.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        shape = (1, channels, *(1,) * (x.dim() - 2))
        scale, shift, mean, variance = (t.view(shape) for t in (scale, shift, mean, variance))
        return (x - mean) / torch.sqrt(variance + eps) * scale + shift

    def sparse(
        self,
        x: Tensor,
        mask: Tensor,
        names: tuple[str, str],
        channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        has_bias: bool = False,
        **strided: Any,
    ) -> tuple[Tensor, Tensor]:
        """Sparse convolution and BatchNorm; without a stride on the voxels of x."""
        num_in, volume = x.shape[1], math.prod(kernel)
        sizes = {"k": (channels,), "rs": kernel, "c": (num_in,)}
        letters = {"krsc": ("k", "rs", "c"), "rsck": ("rs", "c", "k"), "rskc": ("rs", "k", "c")}[self.layout]
        weight = self.weight(names[0], num_in * volume // 3, *(n for part in letters for n in sizes[part]))
        if strided:
            mask = (F.max_pool3d(mask, kernel, **strided) > 0).float()
        x = F.conv3d(x, weight.permute(TO_CONV3D[self.layout]), **(strided or {"padding": 1}))
        if has_bias and self.dialect.has_bias:
            x = x + self.tensor(f"{names[0]}.bias", channels).view(1, -1, 1, 1, 1)
        return self.norm(x, names[1], 1e-3) * mask, mask

    def dense(
        self,
        x: Tensor,
        names: tuple[str, str],
        channels: int,
        eps: float,
        stride: int = 1,
        bias: bool = False,
    ) -> Tensor:
        """3x3 convolution, BatchNorm, ReLU."""
        weight = self.weight(names[0], x.shape[1] * 9, channels, x.shape[1], 3, 3)
        b = self.tensor(f"{names[0]}.bias", channels) if bias and self.dialect.has_bias else None
        return self.norm(F.conv2d(x, weight, b, stride, padding=1), names[1], eps).relu()

    def sparse_backbone(self, x: Tensor, mask: Tensor) -> Tensor:
        config, names = self.config, self.dialect
        x, mask = self.sparse(x, mask, names.conv_input(), config.backbone_3d_channels[0])
        x = x.relu() * mask
        for stage, channels in enumerate(config.backbone_3d_channels, 1):
            num_blocks = config.backbone_3d_num_blocks
            if stage > 1:
                padding = (0, 1, 1) if stage == 4 else (1, 1, 1)
                strided = names.strided(stage, num_blocks[stage - 2])
                x, mask = self.sparse(x, mask, strided, channels, stride=2, padding=padding)
                x = x.relu() * mask
            for block in range(num_blocks[stage - 1]):
                first, second = (names.block(stage, block, k, num_blocks[stage - 1]) for k in (1, 2))
                y, _ = self.sparse(x, mask, first, channels, has_bias=True)
                y, _ = self.sparse(y.relu(), mask, second, channels, has_bias=True)
                x = (x + y).relu()
        kernel, stride = (3, 1, 1), (2, 1, 1)
        channels = config.backbone_3d_out_channels
        x, _ = self.sparse(x, mask, names.conv_out(), channels, kernel, stride=stride, padding=0)
        return x.relu().flatten(1, 2)

    def bev_backbone(self, x: Tensor) -> Tensor:
        config, maps = self.config, []
        for level, channels in enumerate(config.backbone_2d_channels):
            for i in range(1 + config.backbone_2d_num_layers[level]):
                stride = config.backbone_2d_strides[level] if i == 0 else 1
                x = self.dense(x, self.dialect.bev(level, i), channels, 1e-3, stride)
            conv, norm = self.dialect.deblock(level)
            num_out, stride = config.upsample_channels[level], config.upsample_strides[level]
            if stride == 1 and self.dialect.conv_for_stride_1:
                y = F.conv2d(x, self.weight(conv, channels, num_out, channels, 1, 1))
            else:
                y = F.conv_transpose2d(
                    x, self.weight(conv, channels, channels, num_out, stride, stride), stride=stride
                )
            maps.append(self.norm(y, norm, 1e-3).relu())
        return torch.cat(maps, 1)

    def heads(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Raw outputs in the project's convention, under our names of the branches."""
        channels = self.config.head_channels
        x = self.dense(x, self.dialect.shared(), channels, 1e-5, bias=True)
        outputs = []
        for h, group in enumerate(self.config.class_groups):
            output = {}
            for ours, theirs in self.dialect.branches.items():
                size = BRANCHES[ours] or len(group)
                y = self.dense(x, self.dialect.hidden(h, theirs), channels, 1e-5, bias=True)
                name = self.dialect.last(h, theirs)[0]
                weight = self.weight(name, channels * 9, size, channels, 3, 3)
                output[ours] = F.conv2d(y, weight, self.tensor(f"{name}.bias", size), padding=1)
            outputs.append(output)
        return outputs

    def __call__(self, features_VC: Tensor, coords_V4: Tensor) -> list[dict[str, Tensor]]:
        """Raw outputs for one sample."""
        x_cells, y_cells, z_cells = self.config.grid_size
        grid = torch.zeros(1, features_VC.shape[1], z_cells + 1, y_cells, x_cells)
        mask = torch.zeros(1, 1, *grid.shape[2:])
        _, z, y, x = coords_V4.long().unbind(1)
        grid[0, :, z, y, x] = features_VC.T
        mask[0, 0, z, y, x] = 1
        return self.heads(self.bev_backbone(self.sparse_backbone(grid, mask)))


def cloud(config: NetworkConfig = TINY, num_voxels: int = 600) -> tuple[Tensor, Tensor]:
    """Features (V, C) and coordinates (V, 4) of random voxels."""
    generator = torch.Generator().manual_seed(5)
    x_cells, y_cells, z_cells = config.grid_size
    cells = torch.randperm(z_cells * y_cells * x_cells, generator=generator)[:num_voxels]
    z, y, x = cells // (y_cells * x_cells), cells // x_cells % y_cells, cells % x_cells
    features = torch.randn(num_voxels, config.num_point_features, generator=generator)
    return features, torch.stack([torch.zeros_like(z), z, y, x], 1).int()


@torch.no_grad()
def foreign_network(dialect: Dialect, layout: str, config: NetworkConfig = TINY) -> ForeignNetwork:
    """A network with all its tensors made."""
    network = ForeignNetwork(dialect, layout, config)
    network(*cloud(config, min(600, math.prod(config.grid_size))))
    return network
