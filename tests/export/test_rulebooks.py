"""Rulebooks in a graph, of the NumPy reference and of spconv: three ways to the same pairs of voxels."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from exported_networks import run_nodes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpq_train.export.graph import Graph
from cpq_train.export.portable.rulebooks import Voxels, new_voxels, strided_outputs, table
from cpq_train.quantization.reference.rulebook import Kernel, output_positions, rules
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SubMConv3d
from cpq_train.sparse.rulebook import find_or_build

Cell = tuple[int, ...]
Pairs = list[set[tuple[Cell, Cell]]]
"""For each cell of a kernel: which voxel meets which output voxel."""

Coords = NDArray[np.int64]
Case = tuple[Coords, Cell, Kernel]


def centred(size: Cell, dilation: Cell = (1, 1, 1)) -> Kernel:
    """The kernel of a submanifold layer."""
    padding = tuple(d * (k // 2) for d, k in zip(dilation, size, strict=True))
    return Kernel(size, (1, 1, 1), padding, dilation)


def _three(values: Any) -> Any:
    return st.tuples(values, values, values)


@st.composite
def clouds(draw: Any, grid: Cell) -> Coords:
    """Cells of a grid in any order: few, many, all, or those at its borders."""
    cells = np.indices(grid).reshape(3, -1).T
    kind = draw(st.sampled_from(["none", "one", "few", "many", "all", "borders", "corners"]))
    at_end = (cells == 0) | (cells == np.array(grid) - 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    chosen = {"all": np.full(len(cells), True), "borders": at_end.any(1), "corners": at_end.all(1)}
    if kind in chosen:
        cells = cells[chosen[kind]]
    else:
        shares = {"none": 0.0, "one": 1 / len(cells), "few": 0.1, "many": 0.6}
        num = round(shares[kind] * len(cells))
        cells = rng.permutation(cells)[:num]
    return rng.permutation(cells) if draw(st.booleans()) else cells


@st.composite
def submanifold(draw: Any) -> Case:
    grid = draw(_three(st.integers(1, 7)))
    kernel = centred(draw(_three(st.sampled_from([1, 3, 5]))), draw(_three(st.integers(1, 2))))
    return draw(clouds(grid)), grid, kernel


@st.composite
def strided(draw: Any) -> Case:
    """Kernels of any size that fit into the padded grid; onnxruntime's MaxPool pads by less than its size."""
    grid = draw(_three(st.integers(1, 8)))
    size, dilation, padding = [], [], []
    for cells in grid:
        d = draw(st.integers(1, 2))
        k = draw(st.integers(1, 4))
        p = draw(st.integers(0, k - 1))
        while d * (k - 1) + 1 > cells + 2 * p:
            k -= 1
            p = min(p, k - 1)
        size.append(k)
        dilation.append(d)
        padding.append(p)
    stride = draw(_three(st.integers(1, 3)))
    return draw(clouds(grid)), grid, Kernel(tuple(size), stride, tuple(padding), tuple(dilation))


def _set_of(grid: Cell, *kernels: Kernel) -> tuple[Graph, Voxels]:
    graph = Graph()
    coords = graph.cast(graph.input("coords", np.int32, ["V", 3]), np.int64, "voxels.coords")
    return graph, new_voxels(graph, "voxels", coords, grid, kernels)


def _pairs_of_table(rows: NDArray[np.int32], coords: Coords, outputs: Coords) -> Pairs:
    assert rows.dtype == np.int32
    assert rows.min(initial=0) >= -1
    return [
        {(tuple(coords[row]), tuple(out)) for row, out in zip(column, outputs, strict=True) if row >= 0}
        for column in rows.T
    ]


def _in_a_graph(case: Case) -> tuple[Pairs, Coords, Cell]:
    coords, grid, kernel = case
    graph, found = _set_of(grid, kernel)
    outputs, out_grid = strided_outputs(graph, found, kernel, "out")
    rows, cells = run_nodes(
        graph, {"coords": coords.astype(np.int32)}, [table(graph, found, kernel, outputs, "table"), outputs]
    )
    return _pairs_of_table(rows, coords, cells), cells, out_grid


def _submanifold_in_a_graph(case: Case) -> Pairs:
    coords, grid, kernel = case
    graph, found = _set_of(grid, kernel)
    name = table(graph, found, kernel, found.coords, "table")
    (rows,) = run_nodes(graph, {"coords": coords.astype(np.int32)}, [name])
    assert rows.shape == (len(coords), np.prod(kernel.size))
    return _pairs_of_table(rows, coords, coords)


def _with_batch(coords: Coords) -> Coords:
    return np.insert(coords, 0, 0, axis=1)


def _in_numpy(case: Case, outputs: Coords) -> Pairs:
    coords, grid, kernel = case
    found = rules(_with_batch(coords), _with_batch(outputs), kernel.output_shape(grid), kernel)
    return [{(tuple(coords[i]), tuple(outputs[o])) for i, o in zip(*rows, strict=True)} for rows in found]


def _of_spconv(case: Case, is_submanifold: bool) -> tuple[Pairs, Coords, Cell]:
    coords, grid, kernel = case
    geometry = {"padding": kernel.padding, "dilation": kernel.dilation, "bias": False, "indice_key": "a"}
    if is_submanifold:
        layer = SubMConv3d(1, 1, kernel.size, **geometry)
    else:
        layer = SparseConv3d(1, 1, kernel.size, stride=kernel.stride, **geometry)
    indices = torch.from_numpy(_with_batch(coords)).int()
    book = find_or_build(layer, SparseConvTensor(torch.ones(len(coords), 1), indices, list(grid), 1))
    outputs = book.out_indices.numpy()[:, 1:].astype(np.int64)
    pairs: Pairs = []
    for (rows_in, rows_out), num in zip(
        book.indice_pairs.transpose(0, 1).numpy(), book.indice_pair_num.tolist(), strict=True
    ):
        inputs, targets = coords[rows_in[:num]], outputs[rows_out[:num]]
        pairs.append({(tuple(a), tuple(b)) for a, b in zip(inputs, targets, strict=True)})
    if is_submanifold:
        pairs = _whole(pairs, coords)
    return pairs, outputs, tuple(book.out_spatial_shape)


def _whole(half: Pairs, coords: Coords) -> Pairs:
    """Native lists the first half of a submanifold kernel; the other mirrors it, in the middle all meet."""
    middle = len(half) // 2
    mirrored = [{(out, cell) for cell, out in pairs} for pairs in half[:middle]]
    return [*half[:middle], {(tuple(c), tuple(c)) for c in coords}, *mirrored[::-1]]


NO_VOXEL = np.empty((0, 3), np.int64)
CORNERS = np.array(list(np.ndindex(2, 2, 2))) * 4
THREE = (3, 3, 3)


@settings(deadline=None, max_examples=300)
@given(submanifold())
@example((NO_VOXEL, (5, 5, 5), centred(THREE)))
@example((CORNERS, (5, 5, 5), centred(THREE)))
@example((np.indices((3, 3, 3)).reshape(3, -1).T, (3, 3, 3), centred((5, 5, 5), (2, 2, 2))))
def test_submanifold_tables_are_those_of_numpy_and_spconv(case: Case) -> None:
    coords, _, _ = case
    found = _submanifold_in_a_graph(case)
    assert found == _in_numpy(case, coords)
    if len(coords):  # spconv refuses a tensor without voxels
        theirs, outputs, _ = _of_spconv(case, is_submanifold=True)
        assert np.array_equal(outputs, coords)
        assert found == theirs


@settings(deadline=None, max_examples=400)
@given(strided())
@example((NO_VOXEL, (5, 5, 5), Kernel(THREE, (2, 2, 2), (1, 1, 1), (1, 1, 1))))
@example((CORNERS, (5, 5, 5), Kernel(THREE, (2, 2, 2), (1, 1, 1), (1, 1, 1))))
@example((CORNERS, (5, 5, 5), Kernel((3, 1, 1), (2, 1, 1), (0, 0, 0), (1, 1, 1))))
@example((CORNERS, (5, 5, 5), Kernel(THREE, (2, 2, 2), (0, 1, 1), (1, 1, 1))))
def test_strided_tables_and_outputs_are_those_of_numpy_and_spconv(case: Case) -> None:
    coords, grid, kernel = case
    found, outputs, out_grid = _in_a_graph(case)
    assert out_grid == kernel.output_shape(grid)
    reference = output_positions(_with_batch(coords), out_grid, kernel)[:, 1:]
    assert np.array_equal(outputs, reference)  # both in rising order
    assert found == _in_numpy(case, outputs)
    if len(outputs):  # spconv refuses a tensor without voxels, and windows that meet none
        theirs, their_outputs, their_grid = _of_spconv(case, is_submanifold=False)
        assert their_grid == out_grid
        assert {tuple(cell) for cell in their_outputs} == {tuple(cell) for cell in outputs}
        assert len(their_outputs) == len(outputs)
        assert found == theirs


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_one_lookup_serves_kernels_that_reach_differently_far(data: st.DataObject) -> None:
    coords, grid, kernel = data.draw(strided())
    others = [centred(data.draw(_three(st.sampled_from([1, 3, 5])))) for _ in range(2)]
    graph, found = _set_of(grid, kernel, *others)
    outputs, _ = strided_outputs(graph, found, kernel, "out")
    names = [table(graph, found, kernel, outputs, "table")]
    names += [table(graph, found, one, found.coords, f"table{n}") for n, one in enumerate(others)]
    rows, *tables, cells = run_nodes(graph, {"coords": coords.astype(np.int32)}, [*names, outputs])
    assert _pairs_of_table(rows, coords, cells) == _in_numpy((coords, grid, kernel), cells)
    for one, more in zip(others, tables, strict=True):
        assert _pairs_of_table(more, coords, coords) == _in_numpy((coords, grid, one), coords)


def test_a_table_of_known_voxels() -> None:
    """Three voxels in a row along x, the middle one given last: rows 0, 2 and 1."""
    coords = np.array([[0, 0, 0], [0, 0, 2], [0, 0, 1]])
    graph, found = _set_of((1, 1, 3), centred((1, 1, 3)))
    (rows,) = run_nodes(
        graph,
        {"coords": coords.astype(np.int32)},
        [table(graph, found, centred((1, 1, 3)), found.coords, "table")],
    )
    assert rows.tolist() == [[-1, 0, 2], [2, 1, -1], [0, 2, 1]]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_the_lookup_has_a_row_for_each_voxel_and_none_elsewhere(level: str) -> None:
    coords, grid = CORNERS, (5, 5, 5)
    graph, found = _set_of(grid, centred(THREE))
    (lookup,) = run_nodes(graph, {"coords": coords.astype(np.int32)}, [found.lookup], level)
    cells = lookup.reshape(found.padded)[1:-1, 1:-1, 1:-1]
    assert cells.shape == grid
    assert [cells[tuple(cell)] for cell in coords] == list(range(8))
    assert (lookup >= 0).sum() == 8


def test_outputs_rise_in_the_order_of_z_y_x() -> None:
    coords = np.random.default_rng(0).permutation(np.indices((6, 5, 7)).reshape(3, -1).T)[:60]
    _, outputs, _ = _in_a_graph((coords, (6, 5, 7), Kernel(THREE, (2, 2, 2), (1, 1, 1), (1, 1, 1))))
    assert all(tuple(a) < tuple(b) for a, b in pairwise(outputs))
