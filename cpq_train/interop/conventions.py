"""How OpenPCDet, tianweiy/CenterPoint and mmdetection3d name the tensors of this network, and what they mean.

OpenPCDet's names and meaning are ours. The others differ in names, in the sizes and the yaw of a box, and in
the layer that brings a BEV level to the map of the head where the scale stays the same. tianweiy's yaw, and
that of mmdetection3d before 1.0, is y' = -y - pi/2, so that (sin y', cos y') = (-cos y, -sin y).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Source = Literal["openpcdet", "tianweiy", "mmdet3d"]
"""Projects whose checkpoints are converted."""

Weights = Literal["raw", "ema"]
"""Weights as trained, and their moving average."""

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A regular expression for a name of theirs, and what `re.sub` makes of it."""

_WRAPPERS = re.compile(r"^((module|network)\.)+")


@dataclass(frozen=True)
class Convention:
    """What one project's checkpoints look like.

    Attributes:
        project: Its name, with the version where that matters.
        roots: First parts of its tensors' names.
        rules: From its names to ours, each applied once, in this order.
        size_rows: Its row of the size of a box for our length, width, height.
        yaw_rows: Its row of the yaw of a box for our cosine, sine.
        yaw_sign: Factor of these rows.
        upsamples_by_conv: Whether upsampling by 1 is a Conv2d (out, in), not a ConvTranspose2d (in, out).
        has_bias_before_norm: Whether convolutions that a BatchNorm follows have the biases that ours have.
    """

    project: str
    roots: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    size_rows: tuple[int, int, int] = (0, 1, 2)
    yaw_rows: tuple[int, int] = (0, 1)
    yaw_sign: int = 1
    upsamples_by_conv: bool = True
    has_bias_before_norm: bool = True

    def our_name(self, name: str) -> str:
        """The name that a tensor of theirs has in our network, if it has one."""
        name = unwrapped(name)
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def unwrapped(name: str) -> str:
    """A name without what DistributedDataParallel and detectors put in front."""
    return _WRAPPERS.sub("", name)


OPENPCDET = Convention(
    "openpcdet", ("vfe", "backbone_3d", "backbone_2d", "dense_head"), upsamples_by_conv=False
)

TIANWEIY = Convention(
    "tianweiy",
    ("reader", "backbone", "neck", "bbox_head"),
    (
        (r"^backbone\.extra_conv\.", "backbone_3d.conv_out."),
        (r"^backbone\.conv([234])\.([01])\.", r"backbone_3d.conv\1.0.\2."),
        (r"^backbone\.conv([234])\.(\d+)\.", lambda m: f"backbone_3d.conv{m[1]}.{int(m[2]) - 2}."),
        (r"^backbone\.(conv_input|conv1)\.", r"backbone_3d.\1."),
        (r"^neck\.", "backbone_2d."),
        (r"^bbox_head\.shared_conv\.", "dense_head.shared_conv."),
        (r"^(bbox_head\.tasks\.\d+\.)reg\.", r"\1center."),
        (r"^(bbox_head\.tasks\.\d+\.)height\.", r"\1center_z."),
        (r"^bbox_head\.tasks\.(\d+\.\w+)\.([01])\.", r"dense_head.heads_list.\1.0.\2."),
        (r"^bbox_head\.tasks\.(\d+\.\w+)\.3\.", r"dense_head.heads_list.\1.1."),
    ),
    size_rows=(1, 0, 2),
    yaw_sign=-1,
)
"""tianweiy/CenterPoint, which NVIDIA's CUDA-CenterPoint uses too (its code is named det3d)."""


def _residual_block(match: re.Match[str]) -> str:
    """The strided convolution ends a stage in mmdetection3d, and begins the next one here."""
    stage, block = int(match[1]), int(match[2])
    return f"backbone_3d.conv{stage}.{block if stage == 1 else block + 1}.{match[3]}"


_MMDET3D_ROOTS = ("pts_voxel_encoder", "pts_middle_encoder", "pts_backbone", "pts_neck", "pts_bbox_head")
_MMDET3D_RULES: tuple[Rule, ...] = (
    (r"^pts_middle_encoder\.(conv_input|conv_out)\.", r"backbone_3d.\1."),
    (r"^pts_middle_encoder\.encoder_layers\.encoder_layer(\d)\.(\d+)\.((conv|bn)[12]\.)", _residual_block),
    (
        r"^pts_middle_encoder\.encoder_layers\.encoder_layer(\d)\.\d+\.([01])\.",
        lambda m: f"backbone_3d.conv{int(m[1]) + 1}.0.{m[2]}.",
    ),
    # Ours pads in a layer of its own, which counts.
    (r"^pts_backbone\.blocks\.(\d+)\.(\d+)\.", lambda m: f"backbone_2d.blocks.{m[1]}.{int(m[2]) + 1}."),
    (r"^pts_neck\.", "backbone_2d."),
    (r"^(pts_bbox_head\..+)\.conv\.", r"\1.0."),
    (r"^(pts_bbox_head\..+)\.bn\.", r"\1.1."),
    (r"^pts_bbox_head\.shared_conv\.", "dense_head.shared_conv."),
    (r"^(pts_bbox_head\.task_heads\.\d+\.)reg\.", r"\1center."),
    (r"^(pts_bbox_head\.task_heads\.\d+\.)height\.", r"\1center_z."),
    (r"^(pts_bbox_head\.task_heads\.\d+\.)heatmap\.", r"\1hm."),
    (r"^pts_bbox_head\.task_heads\.", "dense_head.heads_list."),
)

MMDET3D_0 = Convention(
    "mmdet3d 0.x",
    _MMDET3D_ROOTS,
    _MMDET3D_RULES,
    size_rows=(1, 0, 2),
    yaw_sign=-1,
    has_bias_before_norm=False,
)
"""mmdetection3d before its boxes were refactored in 1.0."""

MMDET3D_1 = Convention(
    "mmdet3d 1.x", _MMDET3D_ROOTS, _MMDET3D_RULES, yaw_rows=(1, 0), has_bias_before_norm=False
)

_BY_ROOT = {root: c for c in (OPENPCDET, TIANWEIY, MMDET3D_1) for root in c.roots}


def convention_of(name: str) -> Convention | None:
    """The convention that a tensor's name follows, None where no project has such names.

    mmdetection3d's versions have the same names; 1.x stands for both.
    """
    return _BY_ROOT.get(unwrapped(name).split(".")[0])


def sources_of(names: Iterable[str]) -> set[str]:
    """Projects, without version, that the names of a file are of."""
    conventions = (convention_of(name) for name in names)
    return {convention.project.split()[0] for convention in conventions if convention is not None}
