"""Losses of two ranks: their mean, and that of their gradients, is what one process has for all samples."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpq_train.models import BOX_BRANCHES, NetworkConfig, assign_targets, center_loss
from cpq_train.models.center_head import HeadOutput
from cpq_train.models.distillation import DistillationConfig, Outputs, distillation_loss
from cpq_train.models.losses import CODE_WEIGHTS
from cpq_train.models.normalisers import SumOverRanks, one_rank
from cpq_train.models.targets import Targets

GROUPS = (("car",), ("pedestrian", "bicycle"))
CONFIG = NetworkConfig(point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0), class_groups=GROUPS)
"""16 cells along x and y."""
RANKS = (slice(0, 1), slice(1, 3))
"""Samples of each rank: uneven, so that a mean of means is not the mean."""

LossOfRank = Callable[[slice, SumOverRanks], dict[str, Tensor]]


def _leaves() -> list[HeadOutput]:
    generator = torch.Generator().manual_seed(0)

    def draw(channels: int) -> Tensor:
        return torch.randn(3, channels, 16, 16, generator=generator).requires_grad_()

    return [
        {**{name: draw(n) for name, n in BOX_BRANCHES.items()}, "hm": draw(len(group))} for group in GROUPS
    ]


def _of(samples: slice, heads: list[HeadOutput]) -> list[HeadOutput]:
    return [{name: value[samples] for name, value in head.items()} for head in heads]


def _boxes(counts: tuple[int, ...]) -> Tensor:
    """So many cars in each of three samples; pedestrians in the last sample only."""
    boxes = torch.zeros(3, 8, 10)
    for sample, count in enumerate(counts):
        for i in range(count):
            boxes[sample, i] = torch.tensor([i * 1.6 - 6, i * 1.2 - 5, 0, 4, 2, 1.5, 0.3 * i, 1, 0, 1])
    if counts[2]:
        boxes[2, 7] = torch.tensor([5, 5, 0, 0.7, 0.7, 1.7, 0, 0, 0, 9])
    return boxes


def _mean_over_ranks(loss: LossOfRank) -> dict[str, Tensor]:
    counts: list[Tensor] = []

    def note(mine: Tensor) -> Tensor:
        counts.append(mine)
        return mine

    for samples in RANKS:
        loss(samples, note)
    assert len(counts) == len(RANKS)  # one exchange per rank
    assert not any(count.requires_grad for count in counts)
    total = torch.stack(counts).sum(0)
    of_ranks = [loss(samples, lambda _: total) for samples in RANKS]
    return {name: torch.stack([of_rank[name] for of_rank in of_ranks]).mean() for name in of_ranks[0]}


def _check(loss: LossOfRank, leaves: list[Tensor]) -> None:
    whole = loss(slice(0, 3), one_rank)
    ranks = _mean_over_ranks(loss)
    grads = [
        torch.autograd.grad(torch.stack(list(parts.values())).sum(), leaves, allow_unused=True)
        for parts in (whole, ranks)
    ]
    for name in whole:
        torch.testing.assert_close(ranks[name], whole[name], rtol=1e-5, atol=1e-7)
    for one, two in zip(*grads, strict=True):
        if one is not None:
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("counts", [(1, 6, 4), (0, 3, 0), (0, 0, 0)])
def test_detection_loss(counts: tuple[int, ...]) -> None:
    """A rank, or all of them, may have no object."""
    heads, boxes = _leaves(), _boxes(counts)

    def targets(samples: slice) -> Targets:
        return assign_targets(boxes[samples], CONFIG)

    def loss(samples: slice, sum_over_ranks: SumOverRanks) -> dict[str, Tensor]:
        return center_loss(_of(samples, heads), targets(samples), sum_over_ranks=sum_over_ranks)

    _check(loss, [value for head in heads for value in head.values()])
    if counts == (1, 6, 4):
        without = [loss(samples, one_rank)["loss"] for samples in RANKS]
        whole = loss(slice(0, 3), one_rank)["loss"]
        assert abs(float((without[0] + without[1]) / 2 - whole)) > 0.01 * float(whole)


@pytest.mark.parametrize("bias", [0.0, -6.0, -2000.0])
def test_distillation_loss(bias: float) -> None:
    """The teacher sees much, a rank or all ranks see less than one object's worth, or nothing at all."""
    student, teacher = _leaves(), [{k: v.detach() for k, v in head.items()} for head in _leaves()]
    for head in teacher:
        head["hm"] = 2 * head["hm"].flip(0) + bias
    bev = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    if bias == -2000.0:
        bev[1] = 0
    own = bev[0].requires_grad_()

    def loss(samples: slice, sum_over_ranks: SumOverRanks) -> dict[str, Tensor]:
        return distillation_loss(
            Outputs(_of(samples, student), own[samples]),
            Outputs(_of(samples, teacher), bev[1][samples]),
            DistillationConfig(heatmap_weight=1, box_weight=1, bev_weight=1),
            CODE_WEIGHTS,
            sum_over_ranks,
        )

    _check(loss, [own, *(value for head in student for value in head.values())])
