"""Loss from a float teacher: where it is zero, what it weighs, and what its gradients reach."""

import math

import pytest
import torch
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.models import BOX_BRANCHES, CODE_WEIGHTS
from cpq_train.models.distillation import DistillationConfig, Outputs, distillation_loss, peaks_of

EVEN = DistillationConfig(heatmap_weight=1, box_weight=1, bev_weight=1)


def _outputs(seed: int, classes: tuple[int, ...] = (1, 2), bias: float = -3.0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int) -> Tensor:
        return torch.randn(2, channels, 12, 9, generator=generator)

    heads = [
        {**{name: draw(n) for name, n in BOX_BRANCHES.items()}, "hm": 2 * draw(count) + bias}
        for count in classes
    ]
    return Outputs(heads, draw(6))


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _one_object(probability: float, student_probability: float) -> tuple[Outputs, Outputs]:
    """One cell where the teacher sees an object, nothing elsewhere, and a student that answers otherwise."""
    pair = []
    for value in (student_probability, probability):
        head = {name: torch.zeros(1, n, 5, 5) for name, n in BOX_BRANCHES.items()}
        head["hm"] = torch.full((1, 1, 5, 5), -200.0)
        head["hm"][0, 0, 2, 3] = _logit(value)
        pair.append(Outputs([head], torch.zeros(1, 2, 5, 5)))
    return pair[0], pair[1]


def test_zero_where_the_student_equals_the_teacher() -> None:
    parts = distillation_loss(_outputs(0), _outputs(0), EVEN, CODE_WEIGHTS)
    assert [float(value) for value in parts.values()] == [0, 0, 0]


def test_every_part_is_positive_and_weighted() -> None:
    parts = distillation_loss(_outputs(1), _outputs(0), EVEN, CODE_WEIGHTS)
    halved = distillation_loss(_outputs(1), _outputs(0), DistillationConfig(None, 0.5, 0.5, 0), CODE_WEIGHTS)
    assert set(parts) == {"distill_heatmap", "distill_box", "distill_bev"}
    assert all(value > 0 for value in parts.values())
    assert [float(halved[name] / parts[name]) for name in parts] == [0.5, 0.5, 0]


def test_heatmap_divergence_in_closed_form() -> None:
    student, teacher = _one_object(0.8, 0.3)
    parts = distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)
    expected = 0.8 * (
        0.8 * math.log(0.8 / 0.3) + 0.2 * math.log(0.2 / 0.7)
    )  # foreground mass 0.8 counts as 1
    assert float(parts["distill_heatmap"]) == pytest.approx(expected, rel=1e-5)


def test_boxes_are_compared_at_the_peaks_alone() -> None:
    student, teacher = _one_object(0.8, 0.8)
    student.heads[0]["vel"][0, 1, 2, 3] = 3.0
    student.heads[0]["dim"][0, :, 0, 0] = 100.0
    assert float(distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)["distill_box"]) == 3.0
    below, unseen = _one_object(0.05, 0.05)
    below.heads[0]["vel"] += 3.0
    assert float(distillation_loss(below, unseen, EVEN, CODE_WEIGHTS)["distill_box"]) == 0.0


def test_bev_error_is_relative_and_weighted_to_the_foreground() -> None:
    student, teacher = _one_object(0.8, 0.8)
    teacher.bev_BCHW[:] = 2.0
    student.bev_BCHW[:] = 2.0
    student.bev_BCHW[0, 0, 0, 0] = 50.0  # the teacher sees nothing there
    assert float(distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)["distill_bev"]) == 0.0
    student.bev_BCHW[0, 0, 2, 3] = 1.0
    relative = distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)["distill_bev"]
    assert float(relative) == pytest.approx(1 / 8)


def test_peaks_are_local_maxima() -> None:
    _, teacher = _one_object(0.8, 0.8)
    logits = teacher.heads[0]["hm"]
    logits[0, 0, 2, 2] = _logit(0.7)  # beside the peak
    logits[0, 0, 4, 0] = _logit(0.2)
    peaks = peaks_of(teacher.heads)
    assert sorted(peaks.indices[peaks.mask].tolist()) == [2 * 5 + 3, 4 * 5]


def test_gradients_reach_the_student_alone_and_are_finite() -> None:
    student, teacher = _outputs(1), _outputs(0)
    leaves = [*(t for head in student.heads for t in head.values()), student.bev_BCHW]
    for leaf in leaves:
        leaf.requires_grad_()
    parts = distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)
    torch.stack(list(parts.values())).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_a_teacher_that_sees_nothing_teaches_nothing() -> None:
    student, teacher = _outputs(1), _outputs(0, bias=-2000.0)
    teacher.bev_BCHW.zero_()
    parts = distillation_loss(student, teacher, EVEN, CODE_WEIGHTS)
    assert [float(value) for value in parts.values()] == [0, 0, 0]


def test_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"bev_weight is -1; accepted: 0 and above"):
        DistillationConfig(bev_weight=-1)
