"""Fits on the path that a GPU takes, on the CPU: results, what they wait for, steps that are not finite."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.common.kernels import as_on_gpu
from cpq_train.profiling.operator_count import Count, counting_operators
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.training import detector
from cpq_train.training.finite_steps import prepare_to_skip
from cpq_train.training.optim import OptimizerConfig
from cpq_train.verbs.trainer import QuantTrainer
from tests.tiny_fit import NETWORK, DrawnData, Fit, float_checkpoint, run
from tests.training.broken_rank import BROKEN_STEP

NUM_STEPS = 5


class Watch(Callback):
    """Counts what each step dispatches, and keeps the weights from before it."""

    def __init__(self) -> None:
        self.counts: list[Count] = []
        self.weights: list[dict[str, Tensor]] = []
        self.tokens: list[list[str]] = []
        self._open = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
        self.tokens.append(batch["tokens"])
        self.counts.append(self._open.enter_context(counting_operators()))

    def on_train_batch_end(self, *_: Any) -> None:
        self._open.close()

    def on_exception(self, *_: Any) -> None:
        self._open.close()


def _fit(
    folder: Path, *callbacks: Callback, amax: str = "frozen", arm: str = "qat", **trainer: Any
) -> detector.CenterPointDetector:
    module = detector.CenterPointDetector(
        NETWORK,
        weights=str(float_checkpoint(folder)),
        arm=arm,  # type: ignore[arg-type]
        scheme=None if arm != "qat" else "configs/schemes/int8.yaml",
        ranges=RangePolicy(amax=amax, every_num_steps=3),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(lr=3e-5, schedule="cosine"),
    )
    QuantTrainer(
        accelerator="cpu",
        devices=1,
        max_steps=NUM_STEPS,
        log_every_n_steps=10,
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(module, DrawnData(4, 4 * NUM_STEPS))
    return module


@pytest.fixture
def on_gpu() -> Iterator[None]:
    with as_on_gpu():
        yield


@pytest.mark.parametrize("amax", ["frozen", "learned"])
def test_a_step_waits_for_nothing(tmp_path: Path, on_gpu: None, amax: str) -> None:
    """The first makes tables and constants; targets are made before, on the host."""
    watch = Watch()
    _fit(tmp_path, watch, amax=amax, gradient_clip_val=10.0)
    assert [dict(count.waits) for count in watch.counts[1:]] == [{}] * (NUM_STEPS - 1)


def test_a_step_in_which_ranges_move_waits_for_what_was_seen(tmp_path: Path, on_gpu: None) -> None:
    watch = Watch()
    _fit(tmp_path, watch, amax="moving")
    assert [bool(count.num_waits) for count in watch.counts[1:]] == [False, False, True, False]


@pytest.mark.parametrize(
    "ranges", [{"amax": "frozen"}, {"amax": "learned"}, {"amax": "moving", "every_num_steps": 2}]
)
def test_it_trains_as_the_cpu_does(tmp_path: Path, ranges: dict[str, Any]) -> None:
    fit = Fit("fit", num_steps=5, ranges=ranges)
    here = run(fit, tmp_path)
    with as_on_gpu():
        there = run(fit, tmp_path)
    # AdamW is another kernel, and sums of gradients have another order.
    for a, b in zip(here["logged"], there["logged"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    for name, value in here["state"].items():
        torch.testing.assert_close(value, there["state"][name], rtol=1e-3, atol=2e-5)


class Break(Callback):
    """Makes a step's loss, or one gradient of it, something that is not finite."""

    def __init__(self, step: int, what: str) -> None:
        self._step, self._what = step, what

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if index == self._step and self._what == "loss":
            layer = module.network.get_submodule("backbone_2d.deblocks.0.0")  # type: ignore[union-attr]
            layer.register_forward_hook(lambda module, inputs, output: output * torch.nan)
        if index == self._step and self._what == "gradient":
            weight = module.network.get_parameter("dense_head.shared_conv.0.weight")  # type: ignore[union-attr]
            weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))


@pytest.mark.parametrize("step", [2, NUM_STEPS - 1])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(
    tmp_path: Path, on_gpu: None, what: str, step: int
) -> None:
    watch = Watch()
    with pytest.raises(UserError) as stop:
        _fit(tmp_path, watch, Break(step, what))
    said = str(stop.value)
    assert f"step {step}, " in said
    if what == "loss":
        assert watch.tokens[step][0] in said
        assert "first in the output of backbone_2d.deblocks.0.0" in said
    else:
        assert "1 of " in said
        assert "first network.dense_head.shared_conv.0.weight" in said
    assert len(watch.weights) == min(step + 2, NUM_STEPS)  # told within the next step, or at the end
    if step + 1 < NUM_STEPS:
        before, behind = watch.weights[step], watch.weights[step + 1]
        assert all(torch.equal(behind[name], value) for name, value in before.items())
        assert not all(torch.equal(watch.weights[step - 1][name], value) for name, value in before.items())


def test_nothing_is_saved_behind_a_step_that_is_not_finite(tmp_path: Path, on_gpu: None) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.raises(UserError, match="step 1"):
        _fit(tmp_path, Save(), Break(1, "loss"))
    assert [path.name for path in tmp_path.glob("*.ckpt") if path.name != "float.ckpt"] == ["1.ckpt"]


def test_no_rank_takes_in_the_step_that_one_of_them_broke(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.broken_rank", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert f"step {BROKEN_STEP}, " in done.stderr + done.stdout
    for rank in range(2):
        steps = [torch.load(tmp_path / f"{rank}_{index}.pt") for index in range(BROKEN_STEP + 2)]
        assert not (tmp_path / f"{rank}_{BROKEN_STEP + 2}.pt").exists()
        before, broken, behind = steps[-3:]
        assert all(torch.equal(behind[name], value) for name, value in broken.items())
        assert not all(torch.equal(before[name], value) for name, value in broken.items())


def test_an_optimizer_of_one_device_goes_on_on_the_other() -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight]) for weight in weights]
    for turn in range(4):
        for weight, optimizer, is_gpu in zip(weights, optimizers, (turn % 2, 0), strict=True):
            with ExitStack() as stack:
                if is_gpu:
                    stack.enter_context(as_on_gpu())
                prepare_to_skip(optimizer, weight.device)
                weight.grad = torch.tensor([0.1, 0.2, 0.3]) * (turn + 1)
                optimizer.step()
            assert bool(optimizer.param_groups[0]["fused"]) == bool(is_gpu)
    torch.testing.assert_close(*weights)
