"""Range search for activations by what it does to the network's task.

The idea of LiDAR-PTQ (Zhou et al., ICLR 2024): a histogram of a map that is mostly empty says little, so
start from the largest magnitude and try smaller ranges, one quantizer after the other, on an error that looks
at the foreground. What the error is, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.ptq.advance import Advance
from cpq_train.quantization.ptq.shelf import Shelf
from cpq_train.quantization.ptq.twins import Twins
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.switches import quantizers

Objective = Callable[[Any, Any], Tensor]
"""(Output of the float network, of the quantized one) -> a scalar to minimise."""

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
PATIENCE = 2
"""A search ends after so many smaller ranges without a gain."""


def is_searched(quantizer: Quantizer) -> bool:
    """Whether the scheme asks for this search."""
    return quantizer.scheme.method == "foreground" and quantizer.scheme.mode == "static"


@torch.no_grad()
def search_ranges(twins: Twins, objective: Objective, blocks: Sequence[str] = ()) -> dict[str, float]:
    """Shrink the ranges of the input quantizers whose method is `foreground`.

    They are taken in the order of the network. Those behind the one that is searched are still off, so that
    their coarse starting ranges do not drown its effect. A shared quantizer is searched once.

    Cost: for each quantizer 3 to 8 passes over the batches, from its block on; one to four batches are
    enough.

    Args:
        twins: The networks and the batches; the ranges are the largest magnitudes.
        objective: Compares the networks' outputs for one batch.
        blocks: Names of modules in the order in which they run, that hold every layer; nothing: not known.

    Returns:
        Quantizer name -> the fraction of its range that was kept.
    """
    searched = {n: q for n, q in quantizers(twins.network).items() if is_searched(q)}
    if not searched:
        return {}
    wanted = [twins.forward(twins.float_network, batch) for batch in twins.batches]
    for quantizer in searched.values():
        quantizer.disable()
    kept, left = {}, set(searched.values())
    with Shelf.temporary() as shelf:
        passes = Advance(twins.network, blocks, twins.forward, shelf)

        def error() -> float:
            num_done = _num_without(left, [twins.network.get_submodule(name) for name in blocks])
            with frozen(twins.network):
                outputs = (passes.run(num_done, *numbered) for numbered in enumerate(twins.batches))
                return sum(float(objective(*pair)) for pair in zip(wanted, outputs, strict=True))

        for name in twins.track(searched, "Searching ranges"):
            searched[name].enable()
            kept[name] = _search(searched[name], error)
            left.remove(searched[name])
    return kept


def _num_without(left: set[Quantizer], blocks: Sequence[nn.Module]) -> int:
    """How many blocks come before the first that has a quantizer which is not searched yet."""
    return sum(1 for _ in takewhile(lambda block: left.isdisjoint(block.modules()), blocks))


def _search(quantizer: Quantizer, error: Callable[[], float]) -> float:
    """Leave the quantizer with the best fraction of its range, and return the fraction."""
    largest = quantizer._amax.clone()
    best, least = 1.0, float("inf")
    for number, fraction in enumerate(FRACTIONS):
        quantizer.set_amax(largest * fraction)
        now = error()
        if now < least:
            best, least = fraction, now
        elif number - FRACTIONS.index(best) >= PATIENCE:
            break
    quantizer.set_amax(largest * best)
    return best
