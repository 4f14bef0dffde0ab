"""A rulebook that our kernels read, and spconv's too.

Letters: V active voxels.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.core import IndiceData
from torch import Tensor

from cpq_train.common.errors import UserError

if TYPE_CHECKING:
    from cpq_train.sparse.kernels.convolutions import PairLists

MOST_PLACES = 2**31
"""Of the grid behind a strided layer, batch included: they are held in 32 bits."""


class SortedVoxels(NamedTuple):
    """Voxels in the order of their places in the grid.

    Attributes:
        coords_V4: int32 batch, z, y, x.
        places: int64 (V,).
        rows: int32 (V,), the row that each has in the features; None where they are in that order already.
    """

    coords_V4: NDArray[np.int32]
    places: NDArray[np.int64]
    rows: NDArray[np.int32] | None


class PairRulebook(IndiceData):
    """spconv's record of a rulebook on the CPU, and the lists that our kernels read.

    Attributes:
        lists: Which row meets which, by kernel cell.
        voxels: The input's.
    """

    lists: PairLists
    voxels: SortedVoxels

    def is_of(self, x: SparseConvTensor) -> bool:
        """Whether it reads the voxels of x, in their grid."""
        return self.indices is x.indices and list(self.spatial_shape) == list(x.spatial_shape)


def can_build(x: SparseConvTensor, is_subm: bool, kernel: dict[str, Any], out_shape: list[int]) -> bool:
    """Whether `build` finds the pairs of a layer."""
    if is_subm:
        return all(size % 2 for size in kernel["ksize"])
    return int(x.batch_size) * prod(out_shape) < MOST_PLACES


def build(x: SparseConvTensor, is_subm: bool, kernel: dict[str, Any], record: dict[str, Any]) -> PairRulebook:
    """The rulebook of the voxels of x; those behind a strided layer are in the order of their places.

    Args:
        x: Its voxels are each there once, in any order; V > 0.
        is_subm: Whether the layer keeps them.
        kernel: ksize, stride, padding and dilation, each (z, y, x).
        record: What the rulebook is to say beside its pairs.

    Raises:
        UserError: A voxel lies outside its grid.
    """
    from cpq_train.sparse.kernels import convolutions, pair_lists  # Numba, which takes a second

    voxels = _sorted(x)
    coords, places, rows = voxels
    geometry = {name: _sizes(value) for name, value in kernel.items()}
    pairs = torch.empty((2, prod(kernel["ksize"]), len(coords)), dtype=torch.int32)
    sides = pairs.numpy()
    if is_subm:
        grid = _sizes(x.spatial_shape), geometry["ksize"], geometry["dilation"]
        counts = pair_lists.submanifold_pairs(coords, places, *grid, sides)
        out_indices = x.indices
    else:
        out_shape = _sizes(record["out_spatial_shape"])
        how = geometry["ksize"], geometry["stride"], geometry["padding"], geometry["dilation"]
        counts, out_coords = pair_lists.strided_pairs(coords, out_shape, *how, sides)
        out_indices = torch.from_numpy(out_coords)
    sizes = len(coords), len(out_indices)
    tiles = [pair_lists.tile_bounds(side, counts, size) for side, size in zip(sides, sizes, strict=True)]
    if rows is not None:
        for side in sides if is_subm else sides[:1]:
            pair_lists.rows_of(side, counts, rows)
    rulebook = PairRulebook(out_indices, x.indices, pairs, _as_spconv_counts(counts, is_subm), **record)
    rulebook.voxels = voxels
    cells = _cells_in_order(len(counts), is_subm)
    rulebook.lists = convolutions.PairLists(pairs[0], pairs[1], tiles[0], tiles[1], *sizes, cells)
    return rulebook


def _sorted(x: SparseConvTensor) -> SortedVoxels:
    """The voxels of x, sorted once for all its rulebooks."""
    for known in x.indice_dict.values():
        if isinstance(known, PairRulebook) and known.is_of(x):
            return known.voxels
    from cpq_train.sparse.kernels import pair_lists  # Numba, which takes a second

    coords = x.indices.contiguous().numpy()
    places, are_inside, are_rising = pair_lists.places_of(coords, int(x.batch_size), _sizes(x.spatial_shape))
    if not are_inside:
        _refuse(coords, x)
    if are_rising:
        return SortedVoxels(coords, places, None)
    rows = torch.from_numpy(places).argsort(stable=True).numpy()
    return SortedVoxels(coords[rows], places[rows], rows.astype(np.int32))


def _sizes(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _refuse(coords_V4: NDArray[np.int32], x: SparseConvTensor) -> None:
    sizes = np.array([x.batch_size, *x.spatial_shape])
    outside = coords_V4[((coords_V4 < 0) | (coords_V4 >= sizes)).any(1)][0]
    raise UserError(
        f"a voxel has batch, z, y, x {outside.tolist()}; accepted: 0 to {(sizes - 1).tolist()}, the grid of "
        "the sparse tensor"
    )


def _as_spconv_counts(counts: NDArray[np.int64], is_subm: bool) -> Tensor:
    """Pairs of each cell as spconv has them: of a submanifold kernel those before the centre."""
    listed = counts.astype(np.int32)
    if is_subm:
        listed[len(listed) // 2 :] = 0
    return torch.from_numpy(listed)


def _cells_in_order(num_cells: int, is_subm: bool) -> NDArray[np.int64]:
    """The order in which spconv adds them, on which last bits depend: the centre first where voxels stay."""
    cells = np.arange(num_cells)
    middle = num_cells // 2
    return np.concatenate([cells[middle : middle + 1], np.delete(cells, middle)]) if is_subm else cells
