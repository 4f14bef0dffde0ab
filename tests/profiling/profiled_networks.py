"""Networks that profiles are checked on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpq_train.sparse import SparseConv3d, SparseConvTensor, SubMConv3d


class Bottleneck(nn.Module):
    """Residual block of ResNet-50 (He et al., Deep Residual Learning for Image Recognition, 2015)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        out = 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or channels_in != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50 of plain modules, named as torchvision names them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 3, 1)
        self.layer2 = _stage(256, 128, 4, 2)
        self.layer3 = _stage(512, 256, 6, 2)
        self.layer4 = _stage(1024, 512, 3, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(channels_in: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(4 * channels, channels, 1) for _ in range(num_blocks - 1))
    return nn.Sequential(Bottleneck(channels_in, channels, stride), *rest)


class SparseNetwork(nn.Module):
    """Two submanifold convolutions that share a rulebook, a strided one, and a sum over the voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SubMConv3d(3, 8, 3, padding=1, bias=False, indice_key="a")
        self.second = SubMConv3d(8, 8, 3, padding=1, bias=False, indice_key="a")
        self.strided = SparseConv3d(8, 16, 3, stride=2, padding=1, bias=False, indice_key="b")

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        x = SparseConvTensor(features, coords, [9, 16, 16], 1)
        out: Tensor = self.strided(self.second(self.first(x))).features
        return out


def sparse_input(num_voxels: int = 300) -> tuple[Tensor, Tensor]:
    """Features (V, 3) and coordinates (V, 4)."""
    cells = torch.randperm(9 * 16 * 16, generator=torch.Generator().manual_seed(0))[:num_voxels]
    z, rest = cells // 256, cells % 256
    coords = torch.stack([torch.zeros_like(z), z, rest // 16, rest % 16], dim=1).int()
    return torch.randn(num_voxels, 3), coords
