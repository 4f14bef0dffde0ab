"""Numbers of Python as tensors, made once a device: making one is a copy that the host waits for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def constant(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that is shared, and so not to be written to.

    Args:
        numbers: Numbers, or tuples of them at any depth.
        device: Where it is kept.
        dtype: Of its elements.
    """
    with torch.inference_mode(False):  # a tensor of inference mode would be of no use to autograd later on
        return torch.tensor(numbers, dtype=dtype, device=device)
