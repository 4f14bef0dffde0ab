"""Rulebooks from sorted voxels: which input row meets which output row under which kernel cell.

Voxels are numbered by their place in the grid, batch outermost, and taken in that order. Then the neighbour
at a fixed offset moves through the list as its voxel does, and one pass over both finds all pairs of a kernel
cell: no hash table, no search.

Letters: V voxels. Cells of the kernel and axes are in the order z, y, x.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from cpq_train.common.compiled import compiled

TILE = 512
"""Voxels of the smallest tile."""


@intrinsic
def _trailing_zeros(typing, word):
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), generate


@compiled
def places_of(coords_V4: Any, batch_size: int, shape: Any) -> tuple[Any, bool, bool]:
    """The place of each voxel in the grid, int64 (V,); whether all are inside, and whether they rise."""
    places = np.empty(len(coords_V4), np.int64)
    are_inside = are_rising = True
    for i in range(len(coords_V4)):
        b, z, y, x = coords_V4[i]
        are_inside &= 0 <= b < batch_size and 0 <= z < shape[0] and 0 <= y < shape[1] and 0 <= x < shape[2]
        places[i] = ((np.int64(b) * shape[0] + z) * shape[1] + y) * shape[2] + x
        are_rising &= i == 0 or places[i] > places[i - 1]
    return places, are_inside, are_rising


@compiled
def submanifold_pairs(
    coords_V4: Any, numbers: Any, shape: Any, kernel: Any, dilation: Any, pairs: Any
) -> Any:
    """Pairs of voxels of one set, in the order of the voxels.

    Args:
        coords_V4: int32 batch, z, y, x of sorted voxels.
        numbers: Their places in the grid.
        shape: Cells of the grid.
        kernel: Cells of the kernel, odd.
        dilation: Steps between them.
        pairs: int32 (2, cells, V), filled with the places in the list of the input and of the output.

    Returns:
        The number of pairs of each cell.
    """
    num_voxels, num_cells = len(numbers), pairs.shape[1]
    counts = np.zeros(num_cells, np.int64)
    middle = num_cells // 2
    for cell in range(middle):
        dz = (cell // (kernel[1] * kernel[2]) - kernel[0] // 2) * dilation[0]
        dy = (cell // kernel[2] % kernel[1] - kernel[1] // 2) * dilation[1]
        dx = (cell % kernel[2] - kernel[2] // 2) * dilation[2]
        offset = (np.int64(dz) * shape[1] + dy) * shape[2] + dx
        found, other = 0, 0
        for i in range(num_voxels):
            wanted = numbers[i] + offset
            while other < num_voxels and numbers[other] < wanted:
                other += 1
            if other == num_voxels or numbers[other] != wanted:
                continue
            z, y, x = coords_V4[i, 1] + dz, coords_V4[i, 2] + dy, coords_V4[i, 3] + dx
            if 0 <= z < shape[0] and 0 <= y < shape[1] and 0 <= x < shape[2]:
                pairs[0, cell, found], pairs[1, cell, found] = other, i
                found += 1
        counts[cell] = counts[num_cells - 1 - cell] = found
        pairs[0, num_cells - 1 - cell, :found] = pairs[1, cell, :found]
        pairs[1, num_cells - 1 - cell, :found] = pairs[0, cell, :found]
    for i in range(num_voxels):
        pairs[0, middle, i] = pairs[1, middle, i] = i
    counts[middle] = num_voxels
    return counts


@compiled
def _places_behind(coords_V: Any, size: int, cells: int, stride: int, padding: int, dilation: int) -> Any:
    """Output coordinate that a voxel reaches through each cell of an axis, (cells, V); -1 for none."""
    places = np.empty((cells, len(coords_V)), np.int32)
    for cell in range(cells):
        for i in range(len(coords_V)):
            place = coords_V[i] + padding - cell * dilation
            reached = place // stride
            is_reached = place >= 0 and reached * stride == place and reached < size
            places[cell, i] = reached if is_reached else -1
    return places


@compiled
def strided_pairs(
    coords_V4: Any, out_shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, pairs: Any
) -> tuple[Any, Any]:
    """Pairs of voxels and of the voxels that a strided kernel makes of them.

    Args:
        coords_V4: int32 batch, z, y, x of sorted voxels.
        out_shape: Cells of the grid behind; with the batch fewer than 2^31.
        kernel: Cells of the kernel.
        stride: Of it.
        padding: Of it.
        dilation: Of it.
        pairs: See `submanifold_pairs`.

    Returns:
        The number of pairs of each cell; int32 (V', 4), the voxels behind, sorted.
    """
    num_voxels, num_cells = len(coords_V4), pairs.shape[1]
    z_of = _places_behind(coords_V4[:, 1], out_shape[0], kernel[0], stride[0], padding[0], dilation[0])
    y_of = _places_behind(coords_V4[:, 2], out_shape[1], kernel[1], stride[1], padding[1], dilation[1])
    x_of = _places_behind(coords_V4[:, 3], out_shape[2], kernel[2], stride[2], padding[2], dilation[2])
    num_places = (np.int64(coords_V4[-1, 0]) + 1) * out_shape[0] * out_shape[1] * out_shape[2]
    seen = np.zeros(num_places // 64 + 1, np.uint64)  # a bit a place: sorted, and each once
    counts = np.zeros(num_cells, np.int64)
    for cell in range(num_cells):
        zs = z_of[cell // (kernel[1] * kernel[2])]
        ys, xs = y_of[cell // kernel[2] % kernel[1]], x_of[cell % kernel[2]]
        found = 0
        for i in range(num_voxels):
            z, y, x = zs[i], ys[i], xs[i]
            if z | y | x < 0:
                continue
            place = ((np.int64(coords_V4[i, 0]) * out_shape[0] + z) * out_shape[1] + y) * out_shape[2] + x
            seen[place >> 6] |= np.uint64(1) << np.uint64(place & 63)
            pairs[0, cell, found], pairs[1, cell, found] = i, place
            found += 1
        counts[cell] = found
    numbers = _set_bits(seen)
    for cell in range(num_cells):
        row = 0
        for pair in range(counts[cell]):
            while numbers[row] < pairs[1, cell, pair]:
                row += 1
            pairs[1, cell, pair] = row
    return counts, _coords_of(numbers, out_shape)


@compiled
def _set_bits(words: Any) -> Any:
    """The numbers of the bits that are set, int64."""
    total = 0
    for word in words:
        rest = word
        while rest:
            rest &= rest - np.uint64(1)
            total += 1
    numbers = np.empty(total, np.int64)
    found = 0
    for i in range(len(words)):
        rest = words[i]
        while rest:
            numbers[found] = 64 * i + np.int64(_trailing_zeros(rest))
            rest &= rest - np.uint64(1)
            found += 1
    return numbers


@compiled
def _coords_of(numbers: Any, shape: Any) -> Any:
    """int32 batch, z, y, x of places in the grid."""
    coords_V4 = np.empty((len(numbers), 4), np.int32)
    for i in range(len(numbers)):
        rest = numbers[i]
        for axis in range(2, -1, -1):
            coords_V4[i, axis + 1] = rest % shape[axis]
            rest //= shape[axis]
        coords_V4[i, 0] = rest
    return coords_V4


@compiled
def tile_bounds(places: Any, counts: Any, num_voxels: int) -> Any:
    """Where the pairs of each tile begin, int64 (tiles + 1, cells).

    Args:
        places: int32 (cells, pairs), places in the sorted list, rising in each cell.
        counts: Pairs of each cell.
        num_voxels: Length of the list.
    """
    num_tiles = -(-num_voxels // TILE)
    bounds = np.zeros((num_tiles + 1, len(counts)), np.int64)
    for cell in range(len(counts)):
        pair = 0
        for tile in range(num_tiles):
            while pair < counts[cell] and places[cell, pair] < (tile + 1) * TILE:
                pair += 1
            bounds[tile + 1, cell] = pair
    return bounds


@compiled
def rows_of(places: Any, counts: Any, order: Any) -> None:
    """Makes places in the sorted list rows of the features, in place: `order` has the row of each."""
    for cell in range(len(counts)):
        for pair in range(counts[cell]):
            places[cell, pair] = order[places[cell, pair]]
