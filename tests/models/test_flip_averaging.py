import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import NUM_HEADS, of_head
from torch import Tensor

from cpq_train.callbacks.evaluation import postprocessing_sha256
from cpq_train.common.errors import UserError
from cpq_train.data.augmentation import flip_x, flip_y
from cpq_train.data.voxelization import Voxelizer
from cpq_train.models import (
    BOX_BRANCHES,
    CenterPoint,
    HeadOutput,
    NetworkConfig,
    PostProcessing,
    assign_targets,
    decode,
)
from cpq_train.models.flip_averaging import IMAGES, flip_averaged, mirror_head, mirror_voxels
from cpq_train.training.detector import CenterPointDetector

SMALL = NetworkConfig(
    voxel_size=(0.4, 0.4, 0.2),
    point_cloud_range=(-12.8, -25.6, -5.0, 12.8, 25.6, 3.0),
    backbone_3d_channels=(4, 8, 8, 8),
    backbone_3d_num_blocks=(1, 1, 1, 1),
    backbone_3d_out_channels=8,
    backbone_2d_num_layers=(1, 1),
    backbone_2d_channels=(8, 8),
    upsample_channels=(8, 8),
    head_channels=8,
)
OBJECTS = PostProcessing(score_threshold=0.5)


def scene(seed: int, num_points: int = 3000, num_boxes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Points and labelled boxes, each box in a cell of the map (3.2 m) of its own.

    None is at the border, where targets are clamped to the middle of a cell.
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform([-12.8, -25.6, -5, 0, 0], [12.8, 25.6, 3, 255, 0.5], (num_points, 5))
    cells = np.column_stack(np.divmod(rng.choice(6 * 14, num_boxes, replace=False), 14))
    places = (1 + cells + rng.uniform(0.1, 0.9, (num_boxes, 2))) * 3.2 - [12.8, 25.6]
    centres = np.column_stack([places, rng.uniform(-2, 2, num_boxes)])
    sizes = rng.uniform(0.5, 5, (num_boxes, 3))
    others = rng.uniform([-np.pi, -9, -9], [np.pi, 9, 9], (num_boxes, 3))
    labels = rng.permutation(np.arange(num_boxes) % 10) + 1
    return points.astype(np.float32), np.column_stack([centres, sizes, others, labels])


def mirrored(points: np.ndarray, boxes: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The augmentation's flips, which the golden data check; axis 0 changes the sign of x."""
    points, boxes = points.copy(), boxes.copy()
    for axis in axes:
        (flip_y, flip_x)[axis](points, boxes[:, :9])
    return points, boxes


def voxels(points: np.ndarray) -> tuple[Tensor, Tensor]:
    features, cells, _ = Voxelizer(SMALL.voxel_size, SMALL.point_cloud_range, 10, 9999)(points)
    coords = torch.cat([torch.zeros((len(cells), 1), dtype=torch.int32), cells], dim=1)
    return features, coords


def by_cell(features: Tensor, coords: Tensor) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort(coords.numpy().T)
    return features.numpy()[order], coords.numpy()[order]


@pytest.mark.parametrize("axes", IMAGES)
def test_mirrored_voxels_are_those_of_the_mirrored_points(axes: tuple[int, ...]) -> None:
    points, boxes = scene(0)
    ours = by_cell(*mirror_voxels(*voxels(points), axes, SMALL.grid_size))
    theirs = by_cell(*voxels(mirrored(points, boxes, axes)[0]))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def perfect_heads(boxes: np.ndarray) -> list[HeadOutput]:
    """What a network says that knows the boxes (N, 10): the targets as raw outputs."""
    given = torch.from_numpy(boxes).float()[None]
    heads: list[HeadOutput] = []
    targets = assign_targets(given, SMALL)
    for head in range(NUM_HEADS):
        target = of_head(targets, head)
        code = torch.zeros((10, target.heatmap.shape[2] * target.heatmap.shape[3]))
        code[:, target.indices[target.mask]] = target.boxes[target.mask].T
        code_BCHW = code.view(1, 10, *target.heatmap.shape[2:])
        parts = dict(zip(BOX_BRANCHES, code_BCHW.split(list(BOX_BRANCHES.values()), 1), strict=True))
        heads.append({**parts, "hm": torch.where(target.heatmap == 1, 2.0, -4.0)})
    return heads


def detections(heads: list[HeadOutput]) -> np.ndarray:
    """Boxes and labels of the one sample, in the order of x."""
    (found,) = decode(heads, SMALL, replace(OBJECTS, nms_iou=1.0))
    rows = np.column_stack([found.boxes.numpy(), found.labels.numpy() + 1])
    return rows[np.argsort(rows[:, 0])]


def same(found: np.ndarray, boxes: np.ndarray) -> None:
    boxes = boxes[np.argsort(boxes[:, 0])]
    np.testing.assert_allclose(np.cos(found[:, 6] - boxes[:, 6]), 1, atol=1e-5)
    rest = [0, 1, 2, 3, 4, 5, 7, 8, 9]
    np.testing.assert_allclose(found[:, rest], boxes[:, rest], atol=1e-4)


@pytest.mark.parametrize("axes", IMAGES)
def test_a_mirrored_head_decodes_to_the_mirrored_boxes(axes: tuple[int, ...]) -> None:
    points, boxes = scene(1)
    heads = [mirror_head(head, axes) for head in perfect_heads(boxes)]
    same(detections(heads), mirrored(points, boxes, axes)[1])


def test_a_network_that_mirrors_with_its_scene_is_not_changed() -> None:
    points, boxes = scene(2)
    images = [mirrored(points, boxes, axes)[1] for axes in IMAGES]
    calls = itertools.count()

    def network(features: Tensor, coords: Tensor, batch_size: int) -> list[HeadOutput]:
        return perfect_heads(images[next(calls)])

    averaged = flip_averaged(network, SMALL)(*voxels(points), 1)
    assert next(calls) == 4
    for ours, plain in zip(averaged, perfect_heads(boxes), strict=True):
        at_objects = (plain["hm"] > 0).any(1, keepdim=True)
        for name, value in plain.items():
            torch.testing.assert_close(ours[name] * at_objects, value * at_objects, atol=1e-4, rtol=1e-5)
    same(detections(averaged), boxes)


def test_what_is_averaged() -> None:
    """Heat maps behind the sigmoid, sizes behind the exponential, the rest raw."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"center": 2, "center_z": 1, "dim": 3, "rot": 2, "vel": 2, "hm": 2}
    answers = [{n: torch.randn((1, c, 4, 6), generator=rng) for n, c in shapes.items()} for _ in IMAGES]
    remaining = iter(answers)
    points, _ = scene(0)
    (mean,) = flip_averaged(lambda *_: [next(remaining)], SMALL)(*voxels(points), 1)
    upright = [mirror_head(answer, axes) for answer, axes in zip(answers, IMAGES, strict=True)]

    def mean_of(name: str, function: Any = lambda value: value) -> Tensor:
        return sum(function(head[name]) for head in upright) / 4

    torch.testing.assert_close(mean["hm"].sigmoid(), mean_of("hm", torch.sigmoid))
    torch.testing.assert_close(mean["dim"].exp(), mean_of("dim", torch.exp))
    for name in ("center", "center_z", "rot", "vel"):
        torch.testing.assert_close(mean[name], mean_of(name))


def detector(**options: Any) -> CenterPointDetector:
    torch.manual_seed(0)
    everything = PostProcessing(score_threshold=0.0, nms_iou=1.0)
    made = CenterPointDetector(SMALL, post_processing=everything, **options)
    made.configure_model()
    assert isinstance(made.network, CenterPoint)
    for parameter in made.network.dense_head.parameters():  # or all scores would be nearly equal
        parameter.data.mul_(3)
    return made.eval()


@pytest.mark.parametrize("axes", IMAGES[1:])
def test_a_mirrored_scene_gives_mirrored_detections(axes: tuple[int, ...]) -> None:
    """Of a network with random weights, which by itself gives something else."""
    points, boxes = scene(3, num_points=20000)
    for test_time_flip in (True, False):
        found = []
        for cloud in (points, mirrored(points, boxes, axes)[0]):
            features, coords = voxels(cloud)
            batch = {"voxel_features": features, "voxel_coords": coords, "batch_size": 1}
            with torch.no_grad():
                found.append(detector(test_time_flip=test_time_flip).detect(batch)[0])
        first, second = found
        best = [d.scores.argsort(descending=True)[:20] for d in found]
        ours = mirrored(points, first.boxes[best[0]].double().numpy(), axes)[1]
        theirs = second.boxes[best[1]].double().numpy()
        distances = np.linalg.norm(ours[:, None, :6] - theirs[None, :, :6], axis=2).min(axis=1)
        assert (distances.max() < 1e-3) == test_time_flip


def test_settings() -> None:
    assert CenterPointDetector(SMALL).hparams["test_time_flip"] is False
    assert CenterPointDetector(SMALL, test_time_flip=True).hparams["test_time_flip"] is True
    ahead = replace(SMALL, point_cloud_range=(0.0, -25.6, -5.0, 25.6, 25.6, 3.0))
    with pytest.raises(UserError, match=r"test_time_flip with point_cloud_range .*: expected a range"):
        CenterPointDetector(ahead, test_time_flip=True)


def test_hash_of_post_processing() -> None:
    """Off it is the hash that runs have always had."""
    post = CenterPointDetector(SMALL).post_processing
    plain = postprocessing_sha256(post)
    assert plain == "ab1a91ad0a2b57da97b72466ce0925f216ada059697281d8387257a9e66691f5"
    assert postprocessing_sha256(post, True) != plain
