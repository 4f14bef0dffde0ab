"""What to say of a loss that is NaN or infinite: which samples, and which layer it began in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError


def nonfinite_loss(
    network: nn.Module,
    forward: Callable[[], Any],
    losses: Mapping[str, Tensor],
    batch: Mapping[str, Any],
    where: str,
) -> UserError:
    """The error that stops a run before its weights are touched.

    Args:
        network: Whose layers are looked at.
        forward: Runs it once more on the batch.
        losses: Name -> loss; one of them is not finite.
        batch: The batch, with its sample tokens under `tokens`.
        where: Step, batch and rank.
    """
    bad = [name for name, value in losses.items() if not torch.isfinite(value).all()]
    return UserError(
        f"loss {', '.join(bad)} is not finite at {where}: {_cause(network, forward, batch)}; "
        f"samples {', '.join(batch['tokens'])}. No weight was changed by this step"
    )


def _cause(network: nn.Module, forward: Callable[[], Any], batch: Mapping[str, Any]) -> str:
    for name in ("voxel_features", "gt_boxes"):
        if not _is_finite(batch[name]):
            return f"{name} of the batch holds numbers that are not finite"
    for name, parameter in network.named_parameters():
        if not _is_finite(parameter):
            return f"the weights of {name} are already not finite"
    layer = first_nonfinite_layer(network, forward)
    return "no activation of the network is" if layer is None else f"first in the output of {layer}"


@torch.no_grad()
def first_nonfinite_layer(network: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first module whose output is not finite, None where all outputs are."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(value: Any) -> bool:
    """Of a tensor, a sparse tensor's features, and what lists and dictionaries hold of them."""
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    value = getattr(value, "features", value)
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
