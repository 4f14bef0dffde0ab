"""Sparse convolutions of tensors by lists of pairs, and their gradients.

Letters: V voxels, C C' input and output channels. Weights are KRSC, (C', z, y, x, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cpq_train.common.threads import share_out
from cpq_train.sparse.kernels import loops
from cpq_train.sparse.kernels.pair_lists import TILE

HAS_LONG_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether a vector of 16 numbers is one register of 32; with AVX2 it is two of 16."""

ROWS = {4: 6, 2: 12, 1: 8} if HAS_LONG_VECTORS else {1: 6}
"""Vectors of columns -> pairs that are multiplied at a time. Their sums have to fit into the registers beside
the weights, and be enough that none waits for another; measured."""

COLUMNS = {4: 4, 2: 8, 1: 16} if HAS_LONG_VECTORS else {1: 6}
"""The same of gradients of weights, by channels of the input; those left over are slow."""

TILE_BYTES = 2**18
"""Of the sums of a tile."""


class PairLists(NamedTuple):
    """Which row of the input meets which row of the output, by kernel cell.

    Attributes:
        rows_in: int32 (cells, pairs).
        rows_out: The same.
        tiles_in: int64 (tiles + 1, cells), where the pairs of each tile of input voxels begin.
        tiles_out: The same of output voxels.
        num_in: V of the input.
        num_out: V of the output.
        cells: The order in which a sum takes them.
    """

    rows_in: Tensor
    rows_out: Tensor
    tiles_in: NDArray[np.int64]
    tiles_out: NDArray[np.int64]
    num_in: int
    num_out: int
    cells: NDArray[np.int64]

    def turned(self) -> PairLists:
        """From outputs to inputs."""
        return PairLists(
            self.rows_out, self.rows_in, self.tiles_out, self.tiles_in, self.num_out, self.num_in, self.cells
        )


def convolve(x_VC: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
    """(V', C') in fp32: the products of a cell are added one after the other, then cell to cell."""
    return _sums(x_VC, _by_cell(weight, (1, 2, 0)), lists)


def input_gradient(grad_VC: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
    """(V, C) from the gradient (V', C') of the output."""
    return _sums(grad_VC, _by_cell(weight, (1, 0, 2)), lists.turned())


def weight_gradient(x_VC: Tensor, grad_VC: Tensor, lists: PairLists) -> Tensor:
    """KRSC with its three axes of space as one, (C', cells, C)."""
    num_cells, num_channels = len(lists.rows_in), grad_VC.shape[1]
    x, grad = _array(x_VC), _array(_in_vectors(grad_VC))
    width = grad.shape[1]
    sums = torch.zeros((num_cells, x.shape[1], width))
    tiles = _tiles(lists.tiles_out, 4 * (width + x.shape[1]))

    def work(first: int, last: int) -> None:
        for begin, end, vectors in _columns(width):
            loops.add_weight_gradients(
                *(x, lists.rows_in.numpy(), grad, lists.rows_out.numpy(), tiles, sums.numpy(), first, last),
                *(begin, end, (0,) * vectors, (0,) * min(COLUMNS[vectors], x.shape[1])),
            )

    share_out(work, num_cells)
    return sums[..., :num_channels].permute(2, 0, 1).contiguous()


def convolve_codes(x_VC: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
    """int32 (V', C'), exact.

    Args:
        x_VC: u8 codes, of C channels.
        weight: s8 codes as `packed` makes them.
        lists: Of the pairs.
    """
    return _sums(_padded(x_VC, 4 * weight.shape[1]), weight, lists)


def packed(weight_codes: Tensor) -> Tensor:
    """s8 (cells, C / 4, C', 4) of codes in KRSC held in fp32, C filled up to whole steps of four."""
    codes = weight_codes.flatten(1, -2).to(torch.int8)
    codes = _padded(codes, -(-codes.shape[-1] // 4) * 4)
    num_outputs, num_cells, depth = codes.shape
    return codes.view(num_outputs, num_cells, depth // 4, 4).permute(1, 2, 0, 3).contiguous()


def _sums(x_VC: Tensor, weight: Tensor, lists: PairLists) -> Tensor:
    x, num_channels = _array(x_VC), weight.shape[2]
    padded = _in_vectors(weight, 2)
    width = padded.shape[2]
    out = torch.zeros((lists.num_out, width), dtype=_SUMS[x_VC.dtype])
    tiles = _tiles(lists.tiles_out, 4 * width)

    def work(first: int, last: int) -> None:
        for begin, end, vectors in _columns(width):
            loops.add_tiles(
                *(x, lists.rows_in.numpy(), _array(padded), out.numpy(), lists.rows_out.numpy(), tiles),
                lists.cells,
                *(first, last, begin, end, (0,) * vectors, (0,) * ROWS[vectors]),
            )

    share_out(work, len(tiles) - 1)
    return out if width == num_channels else out[:, :num_channels].contiguous()


_SUMS = {torch.uint8: torch.int32, torch.float32: torch.float32}


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Its last axis filled up with zeros."""
    missing = length - tensor.shape[-1]
    return functional.pad(tensor, (0, missing)) if missing else tensor


def _in_vectors(tensor: Tensor, axis: int = -1) -> Tensor:
    """The axis of output channels filled up to whole vectors."""
    length = -(-tensor.shape[axis] // loops.LANES) * loops.LANES
    if length == tensor.shape[axis]:
        return tensor
    return _padded(tensor.transpose(axis, -1), length).transpose(axis, -1).contiguous()


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().contiguous().numpy()
    return array


def _by_cell(weight: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """KRSC as (C', cells, C), its axes in another order."""
    return weight.detach().flatten(1, -2).permute(axes).contiguous()


def _tiles(bounds: NDArray[np.int64], row_bytes: int) -> NDArray[np.int64]:
    """Of the smallest tiles as many together as fit."""
    step = max(1, TILE_BYTES // (row_bytes * TILE))
    return np.concatenate([bounds[:-1:step], bounds[-1:]])


def _columns(num_channels: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of columns and how many vectors at a time take them."""
    first = 0
    for vectors in ROWS:
        width = loops.LANES * vectors
        last = first + (num_channels - first) // width * width
        if last > first:
            yield first, last, vectors
        first = last
