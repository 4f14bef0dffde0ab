"""Ranges of weights: the largest magnitude, or the range with the least squared rounding error."""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_train.quantization.numerics.fake_quant import round_to_codes, scale_of, step_of
from cpq_train.quantization.scheme import QuantizerScheme

NUM_CANDIDATES = 100
"""Ranges tried for `method: mse`, evenly spaced from 1 % to 100 % of the largest magnitude."""


def weight_amax(weight: Tensor, scheme: QuantizerScheme, axis: int | None) -> Tensor:
    """The range of a weight.

    Args:
        weight: Any shape.
        scheme: `method` (max or mse) and the numbers in use.
        axis: Axis of the channels that get a range each, None for one range.

    Returns:
        amax with the dimensions of `weight`, 1 but for `axis`; a scalar without an axis. 0 where the weights
        are all 0.
    """
    weight = weight.detach().float()
    largest = largest_magnitude(weight, axis)
    return largest if scheme.method == "max" else _least_squares(weight, largest, scheme)


def largest_magnitude(tensor: Tensor, axis: int | None) -> Tensor:
    """max|x| over all dimensions but `axis`, which are kept; 0 of an empty tensor."""
    magnitude = tensor.abs()
    if axis is None:
        return magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
    return magnitude.amax([d for d in range(tensor.dim()) if d != axis], keepdim=True)


def _least_squares(weight: Tensor, largest: Tensor, scheme: QuantizerScheme) -> Tensor:
    fmt = scheme.number_format
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(1, 1 / NUM_CANDIDATES, NUM_CANDIDATES).tolist():
        amax = largest * share
        values = round_to_codes(weight, scale_of(amax, fmt), fmt) * step_of(amax, fmt)
        error = (values - weight).square().sum_to_size(largest.shape)
        best, least = torch.where(error < least, amax, best), torch.minimum(error, least)
    return best
