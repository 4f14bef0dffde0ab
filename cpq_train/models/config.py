"""What the network is built from, and the grid that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import CLASS_GROUPS, DETECTION_CLASSES

BN_EPS = 1e-3
"""Of every BatchNorm in the backbones; the head has PyTorch's."""

BACKBONE_3D_STRIDE = 8
"""Downsampling of x and y by the sparse backbone: three strided convolutions."""


@dataclass(frozen=True)
class BevGeometry:
    """The bird's-eye-view map of the head, and how its cells lie in the LiDAR frame.

    Attributes:
        point_cloud_range: x, y, z minimum, then x, y, z maximum, metres.
        voxel_size: voxel edge along x, y, z, metres.
        stride: voxels per cell edge.
        width: number of cells along x (W).
        height: number of cells along y (H).
    """

    point_cloud_range: tuple[float, float, float, float, float, float]
    voxel_size: tuple[float, float, float]
    stride: int
    width: int
    height: int


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a CenterPoint-Voxel network; the defaults are nuScenes at 0.1 m.

    Width, depth and grid are free, so that a small network trains on a laptop with the same code.

    Attributes:
        voxel_size: voxel edge along x, y, z, metres.
        point_cloud_range: x, y, z minimum, then x, y, z maximum, metres; a whole number of voxels.
        num_point_features: features of a voxel (x, y, z, intensity, time lag).
        class_names: the classes, by default nuScenes' ten in OpenPCDet's order; a class id indexes them.
        class_groups: class names by head; a class of no head is not detected.
        backbone_3d_channels: channels of the four sparse stages.
        backbone_3d_num_blocks: residual blocks of each sparse stage.
        backbone_3d_out_channels: channels of the last sparse convolution.
        backbone_2d_num_layers: convolutions of each BEV level behind its first one.
        backbone_2d_channels: channels of each BEV level.
        backbone_2d_strides: stride of each BEV level's first convolution.
        upsample_strides: upsampling of each BEV level to the map of the head. All levels have to agree;
            (2, 4) gives a head map of stride 4.
        upsample_channels: channels of each BEV level after upsampling.
        head_channels: hidden channels of the head.
        backbone_bn_momentum: momentum of the running statistics in both backbones. The published value 0.01
            needs several hundred steps to settle; a short training run from scratch wants more.
    """

    voxel_size: tuple[float, float, float] = (0.1, 0.1, 0.2)
    point_cloud_range: tuple[float, float, float, float, float, float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    num_point_features: int = 5
    class_names: tuple[str, ...] = DETECTION_CLASSES
    class_groups: tuple[tuple[str, ...], ...] = CLASS_GROUPS
    backbone_3d_channels: tuple[int, int, int, int] = (16, 32, 64, 128)
    backbone_3d_num_blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    backbone_3d_out_channels: int = 128
    backbone_2d_num_layers: tuple[int, ...] = (5, 5)
    backbone_2d_channels: tuple[int, ...] = (128, 256)
    backbone_2d_strides: tuple[int, ...] = (1, 2)
    upsample_strides: tuple[int, ...] = (1, 2)
    upsample_channels: tuple[int, ...] = (256, 256)
    head_channels: int = 64
    backbone_bn_momentum: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, as_tuples(getattr(self, field.name)))
        _check_lengths(self)
        _check_class_names(self.class_names)
        _check_class_groups(self.class_groups, self.class_names)
        _check_grid(self)

    @property
    def class_ids(self) -> list[list[int]]:
        """Class ids (indices into `class_names`) by head."""
        return [[self.class_names.index(name) for name in group] for group in self.class_groups]

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Number of voxels along x, y, z."""
        low, high = self.point_cloud_range[:3], self.point_cloud_range[3:]
        x, y, z = (round((b - a) / size) for a, b, size in zip(low, high, self.voxel_size, strict=True))
        return x, y, z

    @property
    def geometry(self) -> BevGeometry:
        """The map of the head."""
        stride = _level_strides(self)[0] // self.upsample_strides[0]
        x, y, _ = self.grid_size
        return BevGeometry(self.point_cloud_range, self.voxel_size, stride, x // stride, y // stride)


def as_tuples(value: object) -> object:
    """Lists, as a YAML file gives them, become tuples at every depth."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _level_strides(config: NetworkConfig) -> list[int]:
    """Voxels per cell edge at each BEV level, before upsampling."""
    strides, stride = [], BACKBONE_3D_STRIDE
    for factor in config.backbone_2d_strides:
        stride *= factor
        strides.append(stride)
    return strides


def _check_lengths(config: NetworkConfig) -> None:
    wanted = {
        "voxel_size": 3,
        "point_cloud_range": 6,
        "backbone_3d_channels": 4,
        "backbone_3d_num_blocks": 4,
        "backbone_2d_channels": len(config.backbone_2d_num_layers),
        "backbone_2d_strides": len(config.backbone_2d_num_layers),
        "upsample_strides": len(config.backbone_2d_num_layers),
        "upsample_channels": len(config.backbone_2d_num_layers),
    }
    for name, length in wanted.items():
        value = getattr(config, name)
        if len(value) != length or length == 0:
            raise UserError(f"{name} is {value}: expected {length} values, and at least one BEV level")


def _check_class_names(class_names: tuple[str, ...]) -> None:
    if not class_names or not all(class_names) or len(set(class_names)) != len(class_names):
        raise UserError(f"class_names is {class_names}: expected one name or more, none empty, none twice")


def _check_class_groups(class_groups: tuple[tuple[str, ...], ...], class_names: tuple[str, ...]) -> None:
    names = [name for group in class_groups for name in group]
    if not names or not all(class_groups) or len(set(names)) != len(names):
        raise UserError(f"class_groups is {class_groups}: expected non-empty groups, no class in two of them")
    unknown = sorted(set(names) - set(class_names))
    if unknown:
        accepted = ", ".join(class_names)
        raise UserError(f"class_groups names {', '.join(unknown)}: accepted are {accepted}")


def _check_grid(config: NetworkConfig) -> None:
    low, high = config.point_cloud_range[:3], config.point_cloud_range[3:]
    for axis, a, b, size in zip("xyz", low, high, config.voxel_size, strict=True):
        cells = (b - a) / size if size > 0 else math.nan
        if not (cells > 0.5 and abs(cells - round(cells)) < 1e-3):
            raise UserError(f"voxel_size {size} m along {axis} does not divide the range [{a}, {b}] m evenly")
    levels = _level_strides(config)
    for name, cells in zip("xy", config.grid_size[:2], strict=True):
        if cells % levels[-1] != 0:
            raise UserError(f"{cells} voxels along {name}: expected a multiple of {levels[-1]}")
    head_strides = {level / upsample for level, upsample in zip(levels, config.upsample_strides, strict=True)}
    if len(head_strides) != 1 or not min(head_strides).is_integer():
        raise UserError(
            f"upsample_strides {config.upsample_strides} with backbone_2d_strides "
            f"{config.backbone_2d_strides} give head strides {sorted(head_strides)}: expected one integer"
        )
