"""Networks that are none of this project's: a ResNet-18, and a spconv U-Net with inverse convolutions."""

from __future__ import annotations

import spconv.pytorch as spconv
import torch
from spconv.core import ConvAlgo
from torch import Tensor, nn

from cpq_train import ResidualAdd


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.add = ResidualAdd()
        self.downsample: nn.Module | None = None
        if stride > 1:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.add(out, identity))


class ResNet18(nn.Module):
    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 2, 4, 8)]
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks = []
        for channels_in, channels in zip([width, *widths], widths, strict=False):
            blocks += [
                BasicBlock(channels_in, channels, 1 + (channels > channels_in)),
                BasicBlock(channels, channels, 1),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def subm(channels_in: int, channels: int, key: str) -> spconv.SparseSequential:
    conv = spconv.SubMConv3d(
        channels_in, channels, 3, padding=1, bias=False, indice_key=key, algo=ConvAlgo.Native
    )
    return spconv.SparseSequential(conv, nn.BatchNorm1d(channels), nn.ReLU())


class SparseUNet(nn.Module):
    """Segmentation of voxels: two levels down by strided convolutions, and back by their inverses."""

    def __init__(self, num_features: int = 4, width: int = 16, num_classes: int = 5) -> None:
        super().__init__()
        native = {"algo": ConvAlgo.Native, "bias": False}
        self.stem = subm(num_features, width, "res1")
        self.down = nn.ModuleList()
        self.encode = nn.ModuleList()
        self.up = nn.ModuleList()
        self.decode = nn.ModuleList()
        for level in (1, 2):
            fine, coarse = width * level, width * (level + 1)
            down = spconv.SparseConv3d(fine, coarse, 3, 2, 1, indice_key=f"down{level}", **native)
            self.down.append(spconv.SparseSequential(down, nn.BatchNorm1d(coarse), nn.ReLU()))
            self.encode.append(subm(coarse, coarse, f"res{level + 1}"))
            up = spconv.SparseInverseConv3d(coarse, fine, 3, indice_key=f"down{level}", **native)
            self.up.append(spconv.SparseSequential(up, nn.BatchNorm1d(fine), nn.ReLU()))
            self.decode.append(subm(2 * fine, fine, f"res{level}"))
        self.head = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        """(V, C), (V, 4) -> logits (V, classes)."""
        x = self.stem(spconv.SparseConvTensor(features, coords, [16, 16, 16], batch_size))
        skips = []
        for down, encode in zip(self.down, self.encode, strict=True):
            skips.append(x)
            x = encode(down(x))
        for level in (1, 0):
            x, skip = self.up[level](x), skips[level]
            x = self.decode[level](x.replace_feature(torch.cat([x.features, skip.features], 1)))
        return self.head(x.features)


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def voxels(seed: int) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.unique(torch.randint(0, 16, (300, 3), generator=generator), dim=0)
    coords = torch.cat([torch.randint(0, 2, (len(coords), 1), generator=generator), coords], 1).int()
    return torch.randn(len(coords), 4, generator=generator), coords, 2


NETWORKS = {
    "resnet": (lambda: ResNet18(width=8), images, nn.functional.cross_entropy),
    "unet": (SparseUNet, voxels, nn.functional.cross_entropy),
}
"""Name -> the float network, its drawn batches, its loss."""
