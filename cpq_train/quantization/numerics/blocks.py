"""Transposed convolutions whose blocks do not overlap, as convolutions of one pixel.

With a stride as large as the kernel every input pixel makes a block of the output of its own: a matrix
product of its channels, whose result is spread over the block. On the CPU PyTorch has one way for all, which
is that of blocks that overlap; a GPU's libraries know better.

Letters: B batch, C C' input and output channels, H W rows and columns, K L those of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_train.common.kernels import are_numbers_at_hand
from cpq_train.quantization.numerics.int8_kernel import Geometry


def are_apart(geometry: Geometry, weight: Tensor) -> bool:
    """Whether a convolution of a weight (C, C', K, L) is such a one, on the CPU."""
    stride = tuple(weight.shape[2:])
    is_here = are_numbers_at_hand(weight.device)
    return is_here and weight.dim() == 4 and geometry == Geometry(stride, (0, 0), (1, 1), True, (0, 0), 1)


def pixel_weight(weight: Tensor) -> Tensor:
    """(C, C', K, L) -> (K L C', C, 1, 1)."""
    return weight.permute(2, 3, 1, 0).reshape(-1, len(weight), 1, 1)


def block_weight(pixel: Tensor, shape: torch.Size) -> Tensor:
    """The other way round, to (C, C', K, L)."""
    num_inputs, num_outputs, rows, columns = shape
    return pixel.view(rows, columns, num_outputs, num_inputs).permute(3, 2, 0, 1)


def spread(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """(B, K L C', H, W) -> (B, C', K H, L W), in channels_last memory."""
    batch, channels, height, width = pixels.shape
    num_outputs = channels // (rows * columns)
    split = pixels.permute(0, 2, 3, 1).reshape(batch, height, width, rows, columns, num_outputs)
    joined = split.transpose(2, 3).reshape(batch, height * rows, width * columns, num_outputs)
    return joined.permute(0, 3, 1, 2)


def gathered(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The other way round, to (B, K L C', H, W) in channels_last memory."""
    batch, num_outputs, height, width = blocks.shape
    split = blocks.permute(0, 2, 3, 1).reshape(
        batch, height // rows, rows, width // columns, columns, num_outputs
    )
    joined = split.transpose(2, 3).reshape(batch, height // rows, width // columns, -1)
    return joined.permute(0, 3, 1, 2)
