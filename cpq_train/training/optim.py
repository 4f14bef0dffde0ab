"""Learning-rate schedules: OpenPCDet's one-cycle for float training, a cosine for tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from cpq_train.common.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule, stepped once per batch.

    Args:
        lr: Largest learning rate.
        weight_decay: Of every parameter, BatchNorm and biases included (as OpenPCDet does it).
        schedule: `onecycle` rises from lr / 10 over `warmup_share` of the steps and falls to lr / 1e5, with
            beta1 going from 0.95 to 0.85 and back (OpenPCDet's adam_onecycle). `cosine` falls from lr to lr /
            100 (pytorch-quantization's recipe: about 10 % of the epochs at 1 % of the learning rate).
        warmup_share: Share of the steps in which a one-cycle rises.
    """

    lr: float = 0.003
    weight_decay: float = 0.01
    schedule: Literal["onecycle", "cosine"] = "onecycle"
    warmup_share: float = 0.4

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optimizer.lr: got {self.lr}, accepted: above 0")
        if not 0 < self.warmup_share < 1:
            raise UserError(f"optimizer.warmup_share: got {self.warmup_share}, accepted: between 0 and 1")


def new_optimizer(
    parameters: list[torch.nn.Parameter],
    config: OptimizerConfig,
    num_steps: int,
    ranges: list[torch.nn.Parameter] | None = None,
    range_lr: float = 0.0,
) -> tuple[AdamW, LRScheduler]:
    """The optimizer and its schedule over `num_steps` steps.

    Args:
        parameters: Of the network.
        config: Learning rate, weight decay and schedule.
        num_steps: Length of the schedule.
        ranges: Learned ranges: a group of their own, without weight decay.
        range_lr: Largest learning rate of `ranges`.
    """
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if ranges:
        groups.append({"params": ranges, "lr": range_lr, "weight_decay": 0.0})
    optimizer = AdamW(groups, lr=config.lr, betas=(0.95, 0.99), eps=1e-8, weight_decay=config.weight_decay)
    return optimizer, _Schedule(optimizer, config, num_steps)


class _Schedule(LRScheduler):
    def __init__(self, optimizer: AdamW, config: OptimizerConfig, num_steps: int) -> None:
        self._config = config
        self._num_steps = num_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of the present step; sets beta1 along with it."""
        rates = []
        for group, largest in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            assert isinstance(largest, float)
            config = replace(self._config, lr=largest)
            lr, beta1 = learning_rate_and_momentum(config, self.last_epoch, self._num_steps)
            group["betas"] = (beta1, group["betas"][1])
            rates.append(lr)
        return rates

    def state_dict(self) -> dict[str, int]:
        """The position alone: the rest is configuration."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take up the position; the optimizer's own state holds the learning rate."""
        self.last_epoch = state_dict["last_epoch"]


def learning_rate_and_momentum(config: OptimizerConfig, step: int, num_steps: int) -> tuple[float, float]:
    """Learning rate and beta1 of a step, 0 to num_steps - 1."""
    if config.schedule == "cosine":
        return _cosine(config.lr, config.lr / 100, min(step / num_steps, 1.0)), 0.9
    rise = int(config.warmup_share * num_steps)
    if step < rise:
        return _cosine(config.lr / 10, config.lr, step / rise), _cosine(0.95, 0.85, step / rise)
    share = min((step - rise) / (num_steps - rise), 1.0)
    return _cosine(config.lr, config.lr / 1e5, share), _cosine(0.85, 0.95, share)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (math.cos(math.pi * share) + 1)
