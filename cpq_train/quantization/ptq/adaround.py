"""AdaRound: learns, weight by weight, whether to round up or down, so that a block keeps its float output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020), with whole blocks in
place of single layers (Li et al., "BRECQ", ICLR 2021). The weight becomes

    clamp(floor(w / step) + h(V), qmin, qmax) * step
    h(V) = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)

and V is learned on the squared error of the block's output plus `lambda * sum(1 - |2 h(V) - 1|^beta)`, which
drives h to 0 or 1. Values of zeta, gamma, lambda, beta, the warm-up and Adam's learning rate are those of the
paper and its authors' implementation (AIMET).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cpq_train.quantization.health import is_weight
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.ptq.advance import Advance
from cpq_train.quantization.ptq.shelf import Shelf
from cpq_train.quantization.ptq.twins import Twins, squared_error
from cpq_train.quantization.switches import quantizers

ZETA, GAMMA = 1.1, -0.1
LAMBDA = 0.01
FIRST_BETA, LAST_BETA = 20.0, 2.0
WARMUP_SHARE = 0.2
"""Share of the steps without the regulariser."""
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class BlockRounding:
    """What learning the rounding of one block brought.

    Attributes:
        block: Name of the block.
        nearest: Squared error of its output with every weight rounded to the nearest.
        learned: The same with learned rounding; where it is not smaller, the block kept nearest rounding.
    """

    block: str
    nearest: float
    learned: float

    @property
    def is_kept(self) -> bool:
        """Whether the learned rounding is in place."""
        return self.learned < self.nearest


class _Call(NamedTuple):
    """One pass of a block: its inputs, and what the float block put out."""

    inputs: tuple[Any, ...]
    target: Any


class _Rounding:
    """Learned rounding of one weight; a weight whose amax is 0 stays 0."""

    def __init__(self, layer: QuantizedConvolution) -> None:
        assert layer._weight_quantizer is not None
        found = layer._weight_quantizer.range_of(layer.weight)
        scale = found.scale.detach()
        self._format = cast(IntegerFormat, layer._weight_quantizer.format)
        self._step = torch.where(scale == 0, 0.0, found.step.detach())
        scaled = layer.weight.detach() * scale
        self._floor = scaled.floor()
        share = scaled - self._floor
        self.logits = torch.logit((share - GAMMA) / (ZETA - GAMMA)).requires_grad_()

    def soft(self) -> Tensor:
        """The weight with every code between its two neighbours."""
        return self._weight(self._share())

    def hard(self) -> Tensor:
        """The weight on its grid: rounding it to the nearest gives the learned codes."""
        return self._weight(self.logits.detach() >= 0)

    def indecision(self, beta: float) -> Tensor:
        """Sum of `1 - |2 h - 1|^beta`: 0 where every weight is decided."""
        decided = (2 * self._share() - 1).abs()
        return torch.sum(1 - decided.pow(beta))

    def _share(self) -> Tensor:
        return (self.logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def _weight(self, up: Tensor) -> Tensor:
        codes = torch.clamp(self._floor + up, self._format.qmin, self._format.qmax)
        return codes * self._step


def round_adaptively(twins: Twins, blocks: Sequence[str], num_steps: int) -> list[BlockRounding]:
    """Learn the rounding of block after block, each on inputs from the blocks rounded before it.

    Weights end on their quantization grid, so that rounding to the nearest finds the learned codes; amax does
    not change. Weights that are not quantized to integers by a static range are left alone.

    Args:
        twins: The networks and the batches. What blocks read and put out lies in files, on a `Shelf`.
        blocks: Names of modules in the order in which they run.
        num_steps: Steps per block, each on one batch.

    Returns:
        What it brought, for every block with a weight to round.
    """
    with Shelf.temporary() as float_shelf, Shelf.temporary() as shelf:
        float_passes = Advance(twins.float_network, blocks, twins.forward, float_shelf)
        passes = Advance(twins.network, blocks, twins.forward, shelf)
        tracked = twins.track(blocks, "Learning to round")
        results = [
            _round_block(twins, name, num_steps, float_passes, passes) for name in tracked if twins.batches
        ]
    return [result for result in results if result is not None]


def _round_block(
    twins: Twins, name: str, num_steps: int, float_passes: Advance, passes: Advance
) -> BlockRounding | None:
    block = twins.network.get_submodule(name)
    layers = {n: m for n, m in block.named_modules() if isinstance(m, QuantizedConvolution)}
    layers = {n: layer for n, layer in layers.items() if _has_static_codes(layer)}
    if not layers:
        return None
    with Shelf.temporary() as calls:
        nearest = _record(twins, name, float_passes, passes, calls)
        roundings = {n: _Rounding(layer) for n, layer in layers.items()}
        _learn(block, calls, roundings, num_steps)
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        _set_weights(layers, {n: rounding.hard() for n, rounding in roundings.items()})
        with torch.no_grad(), frozen(twins.network):
            errors = [float(squared_error(block(*inputs), target)) for inputs, target in calls]
    result = BlockRounding(name, nearest, sum(errors) / len(errors))
    if not result.is_kept:
        _set_weights(layers, before)
    return result


def _has_static_codes(layer: QuantizedConvolution) -> bool:
    quantizer = layer._weight_quantizer
    return (
        quantizer is not None
        and quantizer.scheme.mode == "static"
        and isinstance(quantizer.format, IntegerFormat)
    )


def _record(twins: Twins, name: str, float_passes: Advance, passes: Advance, calls: Shelf) -> float:
    """Keep the calls of a block, one for each batch; the error of its output as it is."""

    def record(number: int, batch: Any) -> float:
        _, target = float_passes.run_to(name, number, batch)
        inputs, output = passes.run_to(name, number, batch)
        calls.append(_Call(inputs, target))
        return float(squared_error(output, target))

    with frozen(twins.network):
        errors = [record(*numbered) for numbered in enumerate(twins.batches)]
    return sum(errors) / len(errors)


def _learn(block: nn.Module, calls: Shelf, roundings: dict[str, _Rounding], num_steps: int) -> None:
    """Learn the logits; weights enter softly rounded, so their quantizers are off, the inputs' stay on."""
    logits = [rounding.logits for rounding in roundings.values()]
    optimizer = torch.optim.Adam(logits, lr=LEARNING_RATE)
    with _weights_as_they_are(block):
        for step in range(num_steps):
            call = calls[step % len(calls)]
            soft = {f"{n}.weight".lstrip("."): r.soft() for n, r in roundings.items()}
            loss = squared_error(functional_call(block, soft, call.inputs), call.target)
            progress = (step / num_steps - WARMUP_SHARE) / (1 - WARMUP_SHARE)
            if progress >= 0:
                beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 + math.cos(math.pi * progress)) / 2
                loss = loss + LAMBDA * sum(r.indecision(beta) for r in roundings.values())
            for logit, grad in zip(logits, torch.autograd.grad(loss, logits), strict=True):
                logit.grad = grad
            optimizer.step()


@contextmanager
def _weights_as_they_are(block: nn.Module) -> Iterator[None]:
    chosen = [quantizer for name, quantizer in quantizers(block).items() if is_weight(name)]
    for quantizer in chosen:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in chosen:
            quantizer.enable()


@torch.no_grad()
def _set_weights(layers: dict[str, QuantizedConvolution], weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        layers[name].weight.copy_(weight)
