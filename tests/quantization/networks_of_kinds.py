"""A small network for every kind of layer with a weight, calibrated, and a step of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_unet import SmallUNet, unet_inputs
from torch import Tensor, nn

from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.scheme import Scheme

Inputs = tuple[Any, ...]
Results = dict[str, Tensor | None]


def random_numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _maps() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1, bias=False),
    )


def _groups() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.Conv2d(6, 2, 1),
    )


def _channels_last() -> nn.Module:
    return _maps().to(memory_format=torch.channels_last)


def _signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 2, 1))


def _volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 2, 2, padding="same"))


def _vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "maps": (_maps, lambda: (random_numbers(2, 3, 7, 6),)),
    "channels_last": (
        _channels_last,
        lambda: (random_numbers(2, 3, 7, 6).contiguous(memory_format=torch.channels_last),),
    ),
    "groups": (_groups, lambda: (random_numbers(2, 4, 7, 6),)),
    "signals": (_signals, lambda: (random_numbers(2, 3, 9),)),
    "volumes": (_volumes, lambda: (random_numbers(2, 2, 5, 6, 7),)),
    "vectors": (_vectors, lambda: (random_numbers(4, 5),)),
    "sparse": (SmallUNet, unet_inputs),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "by channel": {"defaults": {"weight": {"granularity": "per_channel"}, "bias": "float"}},
    "by tensor": {"defaults": {"weight": {"granularity": "per_tensor"}, "bias": "accumulator"}},
    "fp16 biases": {"defaults": {"weight": {"granularity": "per_channel"}, "bias": "fp16"}},
    "mixed": {
        "defaults": {"weight": {"bits": 4, "granularity": "per_channel"}, "bias": "accumulator"},
        "rules": [
            {"layers": "*[02]", "weight": {"bits": 11, "granularity": "per_tensor"}, "input": {"bits": 12}},
            {"layers": "*[2y]", "weight": {"bits": 2, "granularity": "per_tensor"}, "bias": "float"},
        ],
    },
}


def prepared(
    network: nn.Module, inputs: Inputs, scheme: dict[str, Any] | None = None, amax: str = "frozen"
) -> nn.Module:
    prepare(network, Scheme.from_dict(scheme or {}), inputs)
    with collecting_ranges(network), torch.no_grad():
        network(*inputs)
    apply_policy(network, amax)  # type: ignore[arg-type]
    return network


def network_of(kind: str, scheme: str = "by channel", amax: str = "frozen") -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    new, inputs = NETWORKS[kind]
    return prepared(new(), inputs(), SCHEMES[scheme], amax), inputs()


def step(network: nn.Module, inputs: Inputs) -> Results:
    """Output and gradients of one pass; those of the network are added to what was there."""
    first = inputs[0].clone(memory_format=torch.preserve_format).requires_grad_()
    y = network(first, *inputs[1:])
    (y * torch.cos(3 * y.detach())).sum().backward()
    return {"output": y.detach(), "input": first.grad, **gradients_of(network)}


def gradients_of(network: nn.Module) -> Results:
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
