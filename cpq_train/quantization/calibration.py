"""Calibration of a network: gather the ranges of its activations, and check that none is left unfit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cpq_train.errors import UserError
from cpq_train.quantization.switches import quantizers, quantizers_off


@contextmanager
def collecting_ranges(network: nn.Module) -> Iterator[None]:
    """While open, forward passes run in float and gather ranges; on leaving, amax is set and checked.

    Raises:
        UserError: A range came out unfit (`check_ranges`).
    """
    training = network.training
    inputs = [q for name, q in quantizers(network).items() if not name.endswith("_weight_quantizer")]
    network.eval()
    for quantizer in inputs:
        quantizer.start_collecting()
    try:
        with quantizers_off(network), torch.no_grad():
            yield
    finally:
        for quantizer in inputs:
            quantizer.finish_collecting()
        network.train(training)
    check_ranges(network)


def check_ranges(network: nn.Module) -> int:
    """Look at every static amax.

    Returns:
        The number of output channels whose weights are all zero; their amax is 0 and they quantize to 0.

    Raises:
        UserError: An amax is missing (NaN), infinite, negative or zero, with a line for each.
    """
    problems, num_zero_channels = [], 0
    for name, quantizer in quantizers(network).items():
        amax = quantizer.amax
        if amax is None:
            continue
        is_weight = name.endswith("_weight_quantizer")
        if is_weight:
            num_zero_channels += int((amax == 0).sum())
        problem = _problem(amax, zero_is_fine=is_weight and not quantizer.is_per_tensor)
        if problem:
            problems.append(f"  {name}: {problem}")
    if problems:
        raise UserError(f"{len(problems)} quantizers have no usable amax:\n" + "\n".join(problems))
    return num_zero_channels


def _problem(amax: Tensor, zero_is_fine: bool) -> str | None:
    checks = {
        "NaN (it saw no tensor, or no amax was loaded)": amax.isnan(),
        "infinite": amax.isinf(),
        "negative": amax < 0,
    }
    if not zero_is_fine:
        checks["zero (the tensor it saw was zero)"] = amax == 0
    found = [f"{text} in {int(bad.sum())} of {bad.numel()}" for text, bad in checks.items() if bad.any()]
    return "; ".join(found) or None


def is_calibrated(network: nn.Module) -> bool:
    """Whether no static amax is still NaN."""
    return not any(q.amax is not None and bool(q.amax.isnan().any()) for q in quantizers(network).values())
