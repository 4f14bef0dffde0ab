"""Kernels of PyTorch's that multiply codes of 8 bits, for sums of products of codes.

They add in 32-bit integers, and the sum is rounded to fp32 once: the same number as any other exact way. On
the CPU it is oneDNN's convolution (u8 x s8), which is in PyTorch's own builds, several times faster than fp32
products where the processor has VNNI instructions; on a GPU the matrix product, for convolutions of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from cpq_train.common.kernels import HAS_VNNI, are_numbers_at_hand, are_reference
from cpq_train.quantization.numerics.formats import EXACT_LIMIT

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
    return HAS_VNNI and hasattr(torch.ops.onednn, "qconv_pointwise")


IS_AVAILABLE = _is_available()
"""Whether this CPU and this build of PyTorch are fast at it."""


def takes(x_codes: Tensor, w_codes: Tensor, largest_x: int, largest_w: int, geometry: Geometry) -> bool:
    """Whether `convolve` computes this sum: 8 bits, no negative code in the input, a plain 2-D convolution.

    Args:
        x_codes: Codes of the input, (B, C, H, W), bytes or fp32.
        w_codes: Codes of the weight, (C', C, kH, kW).
        largest_x: Largest code the input can have.
        largest_w: Largest magnitude a weight's code can have.
        geometry: Of the convolution.
    """
    return (
        IS_AVAILABLE
        and not are_reference()
        and not torch.compiler.is_compiling()  # the last condition looks at values
        and x_codes.device.type == "cpu"
        and largest_x <= LARGEST_CODE
        and largest_w <= 128
        and x_codes.dim() == 4
        and not geometry.transposed
        and geometry.groups == 1
        and w_codes[0].numel() < MAX_TERMS
        and x_codes.numel() > 0
        and (x_codes.dtype == torch.uint8 or float(x_codes.amin()) >= 0)
    )


OF_A_PIXEL = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
"""A matrix product of the channels of each pixel."""


def takes_pixels(
    x_codes: Tensor, w_codes: Tensor, largest_x: int, largest_w: int, geometry: Geometry
) -> bool:
    """Whether `product_of_pixels` computes this sum on a GPU; arguments as of `takes`.

    Sizes are what `torch._int_mm` demands there.
    """
    num_pixels = x_codes.numel() // max(x_codes.shape[1], 1)
    return (
        not are_numbers_at_hand(x_codes.device)
        and not torch.compiler.is_compiling()
        and geometry == OF_A_PIXEL
        and w_codes.shape[2:].numel() == 1
        and x_codes.dim() == 4
        and num_pixels > 16
        and all(size % 8 == 0 for size in w_codes.shape[:2])
        and max(largest_x, largest_w) <= 128
        and w_codes.shape[1] * largest_x * largest_w < EXACT_LIMIT
    )


def product_of_pixels(x_codes: Tensor, w_codes: Tensor) -> Tensor:
    """(B, C, H, W) codes and (C', C, 1, 1) codes, all of at most 8 bits -> fp32 sums (B, C', H, W).

    Of an input with a NaN, which no integer is, sums are NaN too.
    """
    batch, channels, height, width = x_codes.shape
    rows = x_codes.permute(0, 2, 3, 1).reshape(-1, channels)
    sums = torch._int_mm(rows.to(torch.int8), w_codes.flatten(1).to(torch.int8).t()).float()
    sums.add_(rows.sum(1, keepdim=True), alpha=0)
    return sums.view(batch, height, width, -1).permute(0, 3, 1, 2)


class Packed(NamedTuple):
    """Codes of a weight as oneDNN reads them.

    Attributes:
        codes: In its own layout.
        one: A scale of 1.
        zero: A zero point of 0.
    """

    codes: Tensor
    one: Tensor
    zero: Tensor


def pack(w_codes: Tensor, geometry: Geometry, x_shape: torch.Size) -> Packed:
    """Codes (C', C, kH, kW) of a weight, held in fp32, for inputs of a shape."""
    stride, padding, dilation, _, _, groups = geometry
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    codes = torch.ops.onednn.qconv_prepack(
        w_codes.to(torch.int8), one, 1.0, 0, stride, padding, dilation, groups, x_shape
    )
    return Packed(codes, one, zero)


def convolve(x_codes: Tensor, weight: Packed, geometry: Geometry, bias_codes: Tensor | None = None) -> Tensor:
    """The convolution of two code tensors, without a gradient.

    Args:
        x_codes: (B, C, H, W), bytes or fp32.
        weight: See `pack`.
        geometry: Of the convolution.
        bias_codes: (C',) whole numbers to add to sums that fp32 holds.

    Returns:
        fp32 sums (B, C', H', W'), each rounded once.
    """
    stride, padding, dilation, _, _, groups = geometry
    if x_codes.dtype != torch.uint8:
        # Through int8, which holds these codes too: torch converts to uint8 one number at a time.
        x_codes = x_codes.to(torch.int8).view(torch.uint8)
    acc = torch.ops.onednn.qconv_pointwise(
        *(
            x_codes,
            1.0,
            0,
            weight.codes,
            weight.one,
            weight.zero,
            bias_codes,
            stride,
            padding,
            dilation,
            groups,
        ),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return cast(Tensor, acc)
