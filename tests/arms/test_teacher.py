"""The float teacher: frozen, unseen by the detector, and one forward pass a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpq_train.arms.loading import from_weights
from cpq_train.arms.structure import build
from cpq_train.arms.teacher import Teacher, find_teacher
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.models import CODE_WEIGHTS, CenterPoint, NetworkConfig
from cpq_train.models.distillation import DistillationConfig, run_observed
from cpq_train.training.detector import CenterPointDetector

SMALL = NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_2d_channels=(32, 64),
    upsample_channels=(32, 32),
    head_channels=16,
)


def _batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.stack([torch.randint(0, n, (600,), generator=generator) for n in (2, 40, 128, 128)], 1)
    coords = torch.unique(coords, dim=0).int()
    features = torch.randn(len(coords), 5, generator=generator)
    return {"voxel_features": features, "voxel_coords": coords, "batch_size": 2}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A float checkpoint whose heat maps are not all background."""
    torch.manual_seed(3)
    subject = build(SMALL, "float", None)
    for head in subject.network.dense_head.heads_list:
        nn.init.zeros_(head.get_submodule("hm.1").bias)
    state = {f"network.{name}": value for name, value in subject.network.state_dict().items()}
    torch.save({"state_dict": state, "quantization": subject.describe()}, tmp_path / "float.ckpt")
    return tmp_path / "float.ckpt"


def _load(path: Path) -> CenterPoint:
    detector = CenterPointDetector(SMALL, weights=str(path), arm="float_tuned")
    detector.configure_model()
    return detector.network


def test_a_step_moves_the_student_alone(checkpoint: Path) -> None:
    teacher, student = (
        Teacher(str(checkpoint), SMALL, torch.device("cpu"), DistillationConfig()),
        _load(checkpoint),
    )
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        _, parts = teacher.instruct(student, _batch(), CODE_WEIGHTS)
        losses.append({name: float(value) for name, value in parts.items()})
        with torch.no_grad():
            student.backbone_2d.blocks[0][1].weight.mul_(0.9)  # the first loss is 0 and moves nothing
        optimizer.zero_grad()
        _, parts = teacher.instruct(student, _batch(), CODE_WEIGHTS)
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
    assert list(losses[0].values()) == [0, 0, 0]
    assert all(value > 0 for value in losses[1].values())
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert student.backbone_3d.conv_input[0].weight.grad.any()


def test_the_detector_neither_saves_nor_trains_its_teacher(checkpoint: Path) -> None:
    detector = CenterPointDetector(SMALL, weights=str(checkpoint), arm="float_tuned")
    detector.configure_model()
    names, num_parameters = list(detector.state_dict()), len(list(detector.parameters()))
    detector._teacher = Teacher(str(checkpoint), SMALL, torch.device("cpu"), DistillationConfig())
    assert list(detector.state_dict()) == names
    assert len(list(detector.parameters())) == num_parameters


def test_the_teacher_keeps_no_activations(checkpoint: Path) -> None:
    """What autograd saves grows by the loss's own tensors, not by those of a second network."""
    teacher, student = (
        Teacher(str(checkpoint), SMALL, torch.device("cpu"), DistillationConfig()),
        _load(checkpoint),
    )
    batch = _batch()
    voxels = batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]

    def num_saved(step: Any) -> int:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            step()
        return len(saved)

    plain = num_saved(lambda: student(*voxels))
    taught = num_saved(lambda: teacher.instruct(student, batch, CODE_WEIGHTS))
    with torch.no_grad():
        outputs = run_observed(teacher.network, *voxels)
    assert not any(t.requires_grad for head in outputs.heads for t in head.values())
    assert not outputs.bev_BCHW.requires_grad
    assert plain < taught < 1.5 * plain


def test_a_run_goes_on_with_its_own_teacher(checkpoint: Path) -> None:
    subject = from_weights(SMALL, checkpoint, "float_tuned", None)
    find_teacher(DistillationConfig(), subject, str(checkpoint), is_resumed=False)
    assert subject.parents == {name: sha256_of(checkpoint) for name in ("float", "teacher")}
    find_teacher(DistillationConfig(), subject, str(checkpoint), is_resumed=True)
    subject.parents["teacher"] = "0123"
    with pytest.raises(UserError, match="not the one the run began with, whose SHA-256 is 0123"):
        find_teacher(DistillationConfig(), subject, str(checkpoint), is_resumed=True)


def test_observing_changes_nothing_and_leaves_no_hook(checkpoint: Path) -> None:
    network, batch = _load(checkpoint), _batch()
    voxels = batch["voxel_features"], batch["voxel_coords"], batch["batch_size"]
    with torch.no_grad():
        observed, plain = run_observed(network, *voxels), network(*voxels)
        heads = network.dense_head(observed.bev_BCHW)
    for a, b, c in zip(observed.heads, plain, heads, strict=True):
        assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not network.backbone_2d._forward_hooks
