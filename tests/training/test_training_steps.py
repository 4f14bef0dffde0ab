"""What happens in a step: accumulated batches, mixed precision, clipped and unfit gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_fit import NETWORK, DrawnData, Fit, float_checkpoint, run
from torch.nn.utils import get_total_norm

from cpq_train.common.errors import UserError
from cpq_train.data.dataset import collate
from cpq_train.quantization.switches import quantizers
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.trainer import QuantTrainer


class AtSteps(Callback):
    """Gradient norm as each optimizer step gets it; the ranges and learning rate behind each batch."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.ranges: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(get_total_norm(gradients)))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        found = [q._amax for name, q in quantizers(module).items() if name.endswith("_input_quantizer")]
        self.ranges.append(torch.stack(found) if found else torch.empty(0))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def _fit(folder: Path, steps: AtSteps, **settings: Any) -> dict[str, Any]:
    return run(Fit("fit", **settings), folder, steps)


@pytest.mark.parametrize("arm", ["float", "qat"])
def test_bf16_is_close_to_fp32(arm: str, tmp_path: Path) -> None:
    curves = {}
    for precision in ("32-true", "bf16-mixed"):
        fit = Fit(precision, batch_size=2, num_steps=5, arm=arm, lr=3e-4, trainer={"precision": precision})
        recorded = run(fit, tmp_path)
        curves[precision] = torch.tensor([logged["train/loss"] for logged in recorded["logged"]])
        assert {value.dtype for value in recorded["state"].values() if value.is_floating_point()} == {
            torch.float32
        }
    torch.testing.assert_close(curves["bf16-mixed"], curves["32-true"], rtol=0.02, atol=0)
    # All convolutions but one are quantized in the qat arm, and conv_input, a sparse one, runs in fp32 too.
    assert torch.equal(*curves.values()) == (arm == "qat")


def test_detections_are_fp32_under_autocast(tmp_path: Path) -> None:
    detector = CenterPointDetector(NETWORK, weights=str(float_checkpoint(tmp_path)))
    detector.configure_model()
    for head in detector.network.dense_head.heads_list:
        torch.nn.init.zeros_(head.get_submodule("hm.1").bias)
    batch = collate([DrawnData(2, 2)[i] for i in range(2)])
    with torch.no_grad():
        expected = detector.eval().detect(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = detector.detect(batch)
    assert len(expected[0].scores)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"trainer.precision is '{precision}'; accepted: 32-true, bf16-mixed"):
        QuantTrainer(accelerator="cpu", precision=precision, logger=False)


def test_ranges_move_once_per_step_by_all_its_batches(tmp_path: Path) -> None:
    """Four steps of two batches each: the ranges move behind the first step and the third."""
    moving = {"amax": "moving", "every_num_steps": 2, "momentum": 1.0}
    steps = AtSteps()
    recorded = _fit(
        tmp_path,
        steps,
        batch_size=1,
        num_steps=4,
        ranges=moving,
        lr=1e-30,
        trainer={"accumulate_grad_batches": 2},
    )
    assert recorded["steps"] == 4
    assert len(steps.ranges) == 8
    assert [i for i in range(1, 8) if not torch.equal(steps.ranges[i], steps.ranges[i - 1])] == [1, 5]
    # With momentum 1 a range is what its method finds in the step's samples: also when they are one batch.
    whole = AtSteps()
    _fit(tmp_path, whole, batch_size=2, num_steps=4, ranges=moving, lr=1e-30)
    torch.testing.assert_close(steps.ranges[2], whole.ranges[1], rtol=1e-5, atol=0)
    assert steps.rates[1::2] == whole.rates  # the schedule goes on by steps, not by batches


def test_learned_ranges_with_accumulated_batches(tmp_path: Path) -> None:
    learned = _fit(
        tmp_path,
        AtSteps(),
        batch_size=1,
        num_steps=2,
        ranges={"amax": "learned"},
        trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
    )
    assert learned["steps"] == 2
    assert all(value.isfinite().all() for value in learned["state"].values())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(algorithm: str, tmp_path: Path) -> None:
    """Of the gradients of all accumulated batches, in mixed precision too; the norm logged is that before."""
    steps = AtSteps()
    trainer = {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": algorithm,
        "accumulate_grad_batches": 2,
        "precision": "bf16-mixed",
    }
    recorded = _fit(tmp_path, steps, batch_size=1, num_steps=2, arm="float", trainer=trainer)
    assert recorded["logged"][-1]["train/grad_norm"] > 1
    assert len(steps.norms) >= 1
    if algorithm == "norm":
        assert steps.norms[-1] == pytest.approx(0.01, rel=1e-3)
    else:
        assert 0.01 < steps.norms[-1] < recorded["logged"][-1]["train/grad_norm"]


class Spoil(Callback):
    """Puts NaN into one gradient, as a kernel that overflowed would."""

    name = "network.backbone_2d.blocks.0.1.weight"

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.module: LightningModule | None = None

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.module = module
        self.before = {name: value.clone() for name, value in module.state_dict().items()}
        gradient = module.get_parameter(self.name).grad
        assert gradient is not None
        gradient[0, 0] = torch.nan


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_touches_no_weight(clip: float | None, tmp_path: Path) -> None:
    spoil = Spoil()
    fit = Fit(
        "spoilt",
        batch_size=1,
        num_steps=2,
        arm="float",
        trainer={"gradient_clip_val": clip},
    )
    with pytest.raises(UserError, match=rf"norm is nan.* 1 of \d+ parameters .* first {spoil.name}"):
        run(fit, tmp_path, spoil)
    assert spoil.module is not None
    for name, value in spoil.module.state_dict().items():
        assert torch.equal(value, spoil.before[name]), name
