"""Calibration of a network: gather the ranges of its activations, and check that none is left unfit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cpq_train.quantization.health import Problem, is_weight, refuse, state_problems, value_problems
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.bias_steps import check_biases
from cpq_train.quantization.switches import evaluating, quantizers, quantizers_off

AMAX = "._amax"
"""What follows a quantizer's name in a state dict."""


@contextmanager
def collecting_ranges(
    network: nn.Module, on_unfit: Callable[[list[Problem]], None] = refuse
) -> Iterator[None]:
    """While open, forward passes run in float and gather ranges; on leaving, amax is set and checked.

    Where there is a process group, what all ranks saw is put together on leaving, so every rank must come
    here, with or without batches.

    Args:
        network: What is calibrated.
        on_unfit: What to do about unfit ranges; by default they are an error.

    Raises:
        UserError: A range came out unfit.
    """
    inputs = {name: q for name, q in quantizers(network).items() if not is_weight(name)}
    for quantizer in inputs.values():
        quantizer.start_collecting()
    try:
        with evaluating(network), quantizers_off(network), frozen(network), torch.no_grad():
            yield
        problems = _set_ranges(network, inputs)
    finally:
        for quantizer in inputs.values():
            quantizer.stop_collecting()
    if problems:
        on_unfit(problems)


def _set_ranges(network: nn.Module, inputs: Mapping[str, Quantizer]) -> list[Problem]:
    problems = []
    for name, quantizer in inputs.items():
        found = quantizer.finish_collecting()
        if found:
            problems.append(Problem(name, _layer_kind(network, name), *found))
    return problems + [p for p in range_problems(network) if is_weight(p.quantizer)]


def static_ranges(network: nn.Module) -> dict[str, Tensor]:
    """Quantizer -> its amax, of those that are static."""
    found = {name: quantizer.amax for name, quantizer in quantizers(network).items()}
    return {name: amax for name, amax in found.items() if amax is not None}


def _layer_kind(network: nn.Module, quantizer: str) -> str:
    return getattr(network.get_submodule(quantizer.rpartition(".")[0]), "kind", "")


def range_problems(network: nn.Module) -> list[Problem]:
    """What is wrong with the static ranges of a network."""
    return [
        problem
        for name, amax in static_ranges(network).items()
        for problem in value_problems(name, _layer_kind(network, name), amax)
    ]


def check_ranges(network: nn.Module) -> int:
    """Look at every static amax.

    Returns:
        The number of output channels whose weights are all zero; their amax is 0 and they quantize to 0.

    Raises:
        UserError: An amax is missing (NaN), infinite, negative or zero, or makes a step too small for a bias,
            with a table of them.
    """
    refuse(range_problems(network))
    check_biases(network)
    weights = [amax for name, amax in static_ranges(network).items() if is_weight(name)]
    return sum(int((amax == 0).sum()) for amax in weights)


def problems_of_state(network: nn.Module, state: Mapping[str, Tensor]) -> list[Problem]:
    """What is wrong with the ranges of a state dict that `network` is about to load, under every name."""
    own = {key.removesuffix(AMAX): amax for key, amax in network.state_dict().items() if key.endswith(AMAX)}
    return [
        problem
        for name, amax in own.items()
        for problem in state_problems(name, _layer_kind(network, name), state.get(name + AMAX), amax)
    ]


def is_calibrated(network: nn.Module) -> bool:
    """Whether no static amax is still NaN."""
    return not any(bool(amax.isnan().any()) for amax in static_ranges(network).values())
