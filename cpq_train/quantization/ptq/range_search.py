"""Range search for activations by what it does to the network's task.

The idea of LiDAR-PTQ (Zhou et al., ICLR 2024): a histogram of a map that is mostly empty says little, so
start from the largest magnitude and try smaller ranges, one quantizer after the other, on an error that looks
at the foreground. What the error is, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
def search_ranges(twins: Twins, objective: Objective) -> dict[str, float]:
    """Shrink the ranges of the input quantizers whose method is `foreground`.

    They are taken in the order of the network. Those behind the one that is searched are still off, so that
    their coarse starting ranges do not drown its effect. A shared quantizer is searched once.

    Cost: for each quantizer 3 to 8 passes over the batches; one to four batches are enough.

    Args:
        twins: The networks and the batches; the ranges are the largest magnitudes.
        objective: Compares the networks' outputs for one batch.

    Returns:
        Quantizer name -> the fraction of its range that was kept.
    """
    searched = {n: q for n, q in quantizers(twins.network).items() if is_searched(q)}
    if not searched:
        return {}
    wanted = [twins.forward(twins.float_network, batch) for batch in twins.batches]

    def error() -> float:
        pairs = zip(wanted, twins.batches, strict=True)
        return sum(float(objective(want, twins.forward(twins.network, batch))) for want, batch in pairs)

    for quantizer in searched.values():
        quantizer.disable()
    kept = {}
    for name in twins.track(searched, "Searching ranges"):
        searched[name].enable()
        kept[name] = _search(searched[name], error)
    return kept


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
