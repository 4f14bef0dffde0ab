"""The one-cycle schedule is OpenPCDet's, step for step; the cosine is the published QAT schedule."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.training.optim import OptimizerConfig, learning_rate_and_momentum, new_optimizer


def test_onecycle_equals_openpcdet(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "golden_onecycle.npz")
    config = OptimizerConfig(lr=0.001)
    curve = np.array([learning_rate_and_momentum(config, step, 100) for step in range(100)])
    np.testing.assert_allclose(curve[:, 0], golden["lr"], rtol=1e-12)
    np.testing.assert_allclose(curve[:, 1], golden["beta1"], rtol=1e-12)


def test_adam_steps_equal_openpcdet(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "golden_onecycle.npz")
    initial = {k.removeprefix("init::"): golden[k] for k in golden.files if k.startswith("init::")}
    parameters = {name: nn.Parameter(torch.from_numpy(value)) for name, value in initial.items()}
    optimizer, schedule = new_optimizer(list(parameters.values()), OptimizerConfig(lr=0.001), 100)
    assert optimizer.param_groups[0]["betas"][1] == golden["beta2"]
    for step in range(int(golden["total_steps"])):
        for name, parameter in parameters.items():
            random = np.random.RandomState(zlib.crc32(f"{name}/{step}".encode()))
            parameter.grad = torch.from_numpy(random.normal(0, 3, tuple(parameter.shape)).astype(np.float32))
        torch.nn.utils.clip_grad_norm_(parameters.values(), 10)
        optimizer.step()
        schedule.step()
        if step in (0, 4, 39, 40, 99):
            for name, parameter in parameters.items():
                expected = golden[f"step{step}::{name}"]
                np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_cosine_falls_from_lr_to_a_hundredth() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine")
    rates = [learning_rate_and_momentum(config, step, 50)[0] for step in range(51)]
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)


def test_position_survives_a_checkpoint() -> None:
    def run(
        optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int
    ) -> None:
        for _ in range(steps):
            optimizer.step()
            schedule.step()

    config = OptimizerConfig()
    whole = new_optimizer([nn.Parameter(torch.zeros(1))], config, 20)
    run(*whole, 12)
    first, second = (new_optimizer([nn.Parameter(torch.zeros(1))], config, 20) for _ in range(2))
    run(*first, 5)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    run(*second, 7)
    assert second[0].param_groups[0]["lr"] == whole[0].param_groups[0]["lr"]
    assert second[0].param_groups[0]["betas"] == whole[0].param_groups[0]["betas"]


def test_bad_values() -> None:
    with pytest.raises(UserError, match="got 0, accepted: above 0"):
        OptimizerConfig(lr=0)
    with pytest.raises(UserError, match=r"warmup_share: got 1\.5"):
        OptimizerConfig(warmup_share=1.5)
