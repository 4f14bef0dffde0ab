"""Test-time flip: the network sees a scene and its three mirror images, and the four answers are averaged.

Averaged as tianweiy/CenterPoint's double flip does: heat maps behind the sigmoid, sizes behind the
exponential, all other outputs raw (cosine and sine of the yaw each on its own). Mirrored are the voxels, so
that every image has the same ones. Letters: V voxels, C channels, B batch, H W rows and columns of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.models.center_head import BOX_BRANCHES, HeadOutput
from cpq_train.models.config import NetworkConfig

Network = Callable[[Tensor, Tensor, int], list[HeadOutput]]

IMAGES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1))
"""The coordinates (0 x, 1 y) that change their sign in each image of a scene."""


def check_flippable(config: NetworkConfig) -> None:
    """The mirror image of the range has to be the range.

    Raises:
        UserError: it is not.
    """
    low, high = config.point_cloud_range[:2], config.point_cloud_range[3:5]
    if any(a != -b for a, b in zip(low, high, strict=True)):
        raise UserError(
            f"model.test_time_flip with point_cloud_range {list(config.point_cloud_range)}: "
            "expected a range that is symmetric in x and in y"
        )


def flip_averaged(network: Network, config: NetworkConfig) -> Network:
    """The network as a function that averages over the images of a scene.

    Args:
        network: what is run on each image.
        config: its grid, see `check_flippable`.

    Returns:
        A function of what the network takes, which returns raw outputs like the network's.
    """

    def run(voxel_features_VC: Tensor, voxel_coords_V4: Tensor, batch_size: int) -> list[HeadOutput]:
        answers = []
        for axes in IMAGES:
            features, coords = mirror_voxels(voxel_features_VC, voxel_coords_V4, axes, config.grid_size)
            answers.append([mirror_head(head, axes) for head in network(features, coords, batch_size)])
        return [_mean(heads) for heads in zip(*answers, strict=True)]

    return run


def mirror_voxels(
    features_VC: Tensor, coords_V4: Tensor, axes: Sequence[int], grid_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mirror image of voxels: the voxels of the mirrored points, exactly, but for points on a voxel's face.

    Args:
        features_VC: x and y first.
        coords_V4: batch, z, y, x.
        axes: coordinates that change their sign.
        grid_size: number of voxels along x, y, z.
    """
    features_VC, coords_V4 = features_VC.clone(), coords_V4.clone()
    for axis in axes:
        features_VC[:, axis] *= -1
        coords_V4[:, 3 - axis] = grid_size[axis] - 1 - coords_V4[:, 3 - axis]
    return features_VC, coords_V4


def mirror_head(head: HeadOutput, axes: Sequence[int]) -> HeadOutput:
    """Raw outputs of one head for the mirror image of a scene, from those for the scene.

    A position is a cell plus an offset of 0 to 1 in it, so an offset becomes 1 minus itself. Of the
    direction of yaw and of velocity the component along the axis changes its sign.
    """
    mirrored = {name: value.flip([-1 - axis for axis in axes]) for name, value in head.items()}
    for axis in axes:
        mirrored["center"][:, axis] = 1 - mirrored["center"][:, axis]
        mirrored["rot"][:, axis] *= -1
        mirrored["vel"][:, axis] *= -1
    return mirrored


def _mean(heads: Sequence[HeadOutput]) -> HeadOutput:
    """Raw outputs that decode to the mean of one head's answers, in float32."""
    answers = {name: torch.stack([head[name].float() for head in heads]) for name in (*BOX_BRANCHES, "hm")}
    means = {name: answer.mean(0) for name, answer in answers.items()}
    return {**means, "dim": answers["dim"].exp().mean(0).log(), "hm": answers["hm"].sigmoid().mean(0).logit()}
