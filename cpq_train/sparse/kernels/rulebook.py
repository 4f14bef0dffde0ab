"""A rulebook that our kernels read, and spconv's too.

Letters: V active voxels.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from spconv.pytorch import SparseConvTensor
from spconv.pytorch.core import IndiceData

from cpq_train.common.errors import UserError

if TYPE_CHECKING:
    from cpq_train.sparse.kernels.convolutions import PairLists

MOST_PLACES = 2**31
"""Of the grid behind a strided layer, batch included: they are held in 32 bits."""


class PairRulebook(IndiceData):
    """spconv's record of a rulebook on the CPU, and the lists that our kernels read.

    Attributes:
        lists: Which row meets which, by kernel cell.
    """

    lists: PairLists


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

    coords = x.indices.contiguous().numpy()
    places, are_inside, are_rising = pair_lists.places_of(coords, x.batch_size, _sizes(x.spatial_shape))
    if not are_inside:
        _refuse(coords, x)
    order = None
    if not are_rising:
        order = np.argsort(places, kind="stable").astype(np.int32)
        coords, places = coords[order], places[order]
    geometry = {name: _sizes(value) for name, value in kernel.items()}
    if is_subm:
        pairs, counts = pair_lists.submanifold_pairs(
            coords, places, _sizes(x.spatial_shape), geometry["ksize"], geometry["dilation"]
        )
        out_indices = x.indices
    else:
        pairs, counts, out_coords = pair_lists.strided_pairs(
            coords, _sizes(record["out_spatial_shape"]), *geometry.values()
        )
        out_indices = torch.from_numpy(out_coords)
    sizes = len(coords), len(out_indices)
    tiles = [pair_lists.tile_bounds(side, counts, size) for side, size in zip(pairs, sizes, strict=True)]
    if order is not None:
        for side in pairs if is_subm else pairs[:1]:
            pair_lists.rows_of(side, counts, order)
    rulebook = PairRulebook(
        out_indices, x.indices, torch.from_numpy(pairs), _as_spconv_counts(counts, is_subm), **record
    )
    cells = _cells_in_order(len(counts), is_subm)
    rulebook.lists = convolutions.PairLists(pairs[0], pairs[1], tiles[0], tiles[1], *sizes, cells)
    return rulebook


def _sizes(values: Any) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _refuse(coords_V4: NDArray[np.int32], x: SparseConvTensor) -> None:
    sizes = np.array([x.batch_size, *x.spatial_shape])
    outside = coords_V4[((coords_V4 < 0) | (coords_V4 >= sizes)).any(1)][0]
    raise UserError(
        f"a voxel has batch, z, y, x {outside.tolist()}; accepted: 0 to {(sizes - 1).tolist()}, the grid of "
        "the sparse tensor"
    )


def _as_spconv_counts(counts: NDArray[np.int64], is_subm: bool) -> torch.Tensor:
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
