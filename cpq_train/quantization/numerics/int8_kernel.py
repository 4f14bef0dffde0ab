"""oneDNN's 8-bit convolution, which is in PyTorch's own CPU builds, for sums of products of codes.

It adds u8 x s8 products in 32-bit integers and rounds the sum to fp32 once: the same number as any other
exact way, several times faster than fp32 products where the CPU has VNNI instructions.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

LARGEST_CODE = 127
"""Of the input. With 8 full bits, pairs of products would saturate on CPUs without VNNI."""

MAX_TERMS = 2**31 // (127 * 128)
"""So many products fit into a 32-bit sum."""


class Geometry(NamedTuple):
    """Arguments of `torch.convolution` behind input, weight and bias; see nn.Conv2d."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def _is_available() -> bool:
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return bool(has_vnni()) and hasattr(torch.ops.onednn, "qconv_pointwise")


IS_AVAILABLE = _is_available()
"""Whether this CPU and this build of PyTorch are fast at it."""


def takes(x_codes: Tensor, w_codes: Tensor, largest_x: int, largest_w: int, geometry: Geometry) -> bool:
    """Whether `convolve` computes this sum: 8 bits, no negative code in the input, a plain 2-D convolution.

    Args:
        x_codes: Codes of the input, (B, C, H, W).
        w_codes: Codes of the weight, (C', C, kH, kW).
        largest_x: Largest code the input can have.
        largest_w: Largest magnitude a weight's code can have.
        geometry: Of the convolution.
    """
    return (
        IS_AVAILABLE
        and not torch.compiler.is_compiling()  # the last condition looks at values
        and x_codes.device.type == "cpu"
        and largest_x <= LARGEST_CODE
        and largest_w <= 128
        and x_codes.dim() == 4
        and not geometry.transposed
        and geometry.groups == 1
        and w_codes[0].numel() < MAX_TERMS
        and x_codes.numel() > 0
        and float(x_codes.amin()) >= 0
    )


def convolve(x_codes: Tensor, w_codes: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of two code tensors held in fp32, without a gradient.

    Returns:
        fp32 sums (B, C', H', W'), each the exact sum rounded once.
    """
    stride, padding, dilation, _, _, groups = geometry
    ones = torch.ones(w_codes.shape[0])
    zeros = torch.zeros(w_codes.shape[0], dtype=torch.int64)
    w_s8 = torch.ops.onednn.qconv_prepack(
        w_codes.to(torch.int8), ones, 1.0, 0, stride, padding, dilation, groups, x_codes.shape
    )
    # Through int8, which holds these codes too: torch converts to uint8 one number at a time.
    x_u8 = x_codes.to(torch.int8).view(torch.uint8)
    acc = torch.ops.onednn.qconv_pointwise(
        *(x_u8, 1.0, 0, w_s8, ones, zeros, None, stride, padding, dilation, groups),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return cast(Tensor, acc)
