"""What collectors take from a tensor: its limits, and how often which magnitude occurs.

On the CPU each is one pass over its memory (`loops.py`), elsewhere several of PyTorch's; the bits are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.quantization.numerics.one_pass import flat, in_parts, is_fit


def limits_of(values: Tensor) -> Tensor:
    """-minimum and maximum of a tensor that has any values, (2,) fp32 on its device; NaN if one is NaN."""
    if not is_fit(values):
        low, high = values.aminmax()
        return torch.stack([-low, high]).float()
    found = _by_part(lambda part: _loops().limits(part.view(np.int32)), values)
    keys = np.array([min(low for low, _ in found), max(high for _, high in found)], np.int32)
    low, high = (keys ^ ((keys >> 31) & np.int32(2**31 - 1))).view(np.float32)
    return torch.full((2,), torch.nan) if np.isnan(low) or np.isnan(high) else torch.tensor([-low, high])


def counts_of(values: Tensor, bin_width: float, num_bins: int) -> NDArray[np.int64]:
    """How many magnitudes lie in each of the bins, (num_bins,); zeros are left out.

    Args:
        values: Finite, within the bins.
        bin_width: A power of two: so the division by it is exact, and with it the choice of the bin.
        num_bins: That count; the first begins at 0.
    """
    if not is_fit(values):
        bins = (values[values != 0].abs().float() / bin_width).int()
        return cast(NDArray[np.int64], torch.bincount(bins, minlength=num_bins).cpu().numpy())

    def counted(part: NDArray[Any]) -> NDArray[np.int64]:
        counts = np.zeros(num_bins + 1, np.int64)
        _loops().add_counts(part, np.float32(1 / bin_width), counts)
        return counts

    total: NDArray[np.int64] = np.sum(_by_part(counted, values), 0)
    return total[1:]


def _by_part(count: Callable[[NDArray[Any]], Any], values: Tensor) -> list[Any]:
    """What a loop says of the parts of a tensor, of which each thread has one."""
    array = flat(values)
    found: list[Any] = []
    in_parts(lambda first, last: found.append(count(array[first:last])), len(array))
    return found


def _loops() -> ModuleType:
    from cpq_train.quantization.calibrators import loops  # Numba, whose import takes a second

    return loops
