"""Pair lists of our own against those of spconv, and how spconv's kernels read them."""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_grids import grid_order, sparse_input
from spconv.core import ConvAlgo
from spconv.pytorch import SparseMaxPool3d
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SubMConv3d,
    reference_kernels,
)
from cpq_train.sparse.kernels.rulebook import PairRulebook
from cpq_train.sparse.rulebook import Rulebook, find_or_build, gather_multiply_scatter, num_pairs

Geometry: TypeAlias = dict[str, Any]


@st.composite
def _voxels(draw: st.DrawFn) -> SparseConvTensor:
    """Voxels of a tiny grid, sorted or in any order; axes may have one cell."""
    shape = draw(st.lists(st.integers(1, 6), min_size=3, max_size=3))
    batch_size, seed = draw(st.integers(1, 3)), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    occupied = torch.rand((batch_size, *shape), generator=generator) < draw(st.floats(0.05, 1.0))
    coords = occupied.nonzero().int().contiguous()
    if not len(coords):
        coords = torch.tensor([[batch_size - 1, 0, 0, shape[2] - 1]], dtype=torch.int32)
    if draw(st.booleans()):
        coords = coords[torch.randperm(len(coords), generator=generator)]
    return SparseConvTensor(torch.randn((len(coords), 4), generator=generator), coords, shape, batch_size)


def _threes(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(values, values, values)


SUBMANIFOLD = st.fixed_dictionaries(
    {"kernel_size": _threes(st.sampled_from([1, 3, 5])), "dilation": _threes(st.integers(1, 3))}
).filter(lambda geometry: max(geometry["kernel_size"]) > 1)
STRIDED = st.fixed_dictionaries(
    {
        "kernel_size": _threes(st.integers(1, 4)),
        "stride": _threes(st.integers(1, 3)),
        "padding": _threes(st.integers(0, 3)),
        "dilation": _threes(st.integers(1, 2)),
    }
).filter(lambda geometry: max(geometry["kernel_size"]) > 1)


def _fresh(x: SparseConvTensor) -> SparseConvTensor:
    return SparseConvTensor(x.features, x.indices, x.spatial_shape, x.batch_size)


def _as_spconv_reads(rulebook: Any) -> Counter[tuple[Any, ...]]:
    """(cell, voxel in, voxel out) of each pair: of a submanifold kernel one half is listed."""
    pairs, counts = rulebook.indice_pairs, rulebook.indice_pair_num.tolist()
    if rulebook.is_subm:
        middle = len(counts) // 2
        counts = [*counts[:middle], len(rulebook.indices), *counts[:middle][::-1]]
        mirrored = pairs.flip(0).flip(1)
        pairs = torch.cat([pairs[:, : middle + 1], mirrored[:, middle + 1 :]], 1)
        pairs[:, middle] = torch.arange(pairs.shape[2])
    return _named(rulebook, pairs[0], pairs[1], counts)


def _as_we_read(rulebook: PairRulebook) -> Counter[tuple[Any, ...]]:
    lists = rulebook.lists
    assert (lists.tiles_in[-1] == lists.tiles_out[-1]).all()
    return _named(rulebook, lists.rows_in, lists.rows_out, lists.tiles_in[-1].tolist())


def _named(rulebook: Rulebook, rows_in: Tensor, rows_out: Tensor, counts: list[int]) -> Counter[Any]:
    voxels_in, voxels_out = rulebook.indices.tolist(), rulebook.out_indices.tolist()
    return Counter(
        (cell, tuple(voxels_in[i]), tuple(voxels_out[o]))
        for cell, count in enumerate(counts)
        for i, o in zip(rows_in[cell, :count].tolist(), rows_out[cell, :count].tolist(), strict=True)
    )


def _check(layer: nn.Module, x: SparseConvTensor) -> None:
    with reference_kernels():
        theirs = find_or_build(layer, _fresh(x))
        expected = layer(_fresh(x))
    ours = find_or_build(layer, _fresh(x))
    assert isinstance(ours, PairRulebook)
    pairs = _as_spconv_reads(theirs)
    assert _as_we_read(ours) == _as_spconv_reads(ours) == pairs
    assert num_pairs(ours) == num_pairs(theirs) == sum(pairs.values())
    assert ours.out_spatial_shape == theirs.out_spatial_shape
    with reference_kernels():  # spconv's kernels, our pairs
        features = gather_multiply_scatter(x.features, layer.weight, ours)
    read = layer.place(x, features + layer.bias, ours)
    assert torch.equal(read.indices[grid_order(read)], expected.indices[grid_order(expected)])
    assert torch.equal(read.features[grid_order(read)], expected.features[grid_order(expected)])


@given(x=_voxels(), geometry=SUBMANIFOLD)
@settings(max_examples=60, deadline=None)
def test_submanifold_pairs_are_those_of_spconv(x: SparseConvTensor, geometry: Geometry) -> None:
    _check(SubMConv3d(4, 5, **geometry), x)


@given(x=_voxels(), geometry=STRIDED)
@settings(max_examples=60, deadline=None)
def test_strided_pairs_are_those_of_spconv(x: SparseConvTensor, geometry: Geometry) -> None:
    layer = SparseConv3d(4, 5, **geometry)
    reach = zip(*(geometry[name] for name in ("kernel_size", "padding", "dilation")), strict=True)
    spans = [n + 2 * p - d * (k - 1) for n, (k, p, d) in zip(x.spatial_shape, reach, strict=True)]
    if min(spans) > 0:
        _check(layer, x)


@pytest.mark.parametrize("outside", [[-1, 0, 0, 0], [2, 0, 0, 0], [0, 9, 0, 0], [1, 0, -1, 0], [0, 0, 0, 10]])
@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_voxels_outside_are_named(kind: type[SubMConv3d | SparseConv3d], outside: list[int]) -> None:
    x = sparse_input(4)
    coords = torch.cat([x.indices, torch.tensor([outside]).int()])
    x = SparseConvTensor(torch.zeros(len(coords), 4), coords, x.spatial_shape, x.batch_size)
    said = str(outside).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(UserError, match=rf"batch, z, y, x {said}; accepted: 0 to \[1, 8, 11, 9\]"):
        kind(4, 5, 3, padding=1, indice_key="a")(x)


def test_what_we_do_not_find_is_left_to_spconv() -> None:
    x = sparse_input(4)
    with pytest.raises(RuntimeError, match="subm only support odd ksize"):
        find_or_build(SubMConv3d(4, 5, 2), x)
    x.spatial_shape = [1500, 1500, 1500]  # voxels behind would not fit into 32 bits
    assert not isinstance(find_or_build(SparseConv3d(4, 5, 3), x), PairRulebook)
    _check(SubMConv3d(4, 5, 3, dilation=2), x)


def test_a_number_of_samples_may_be_a_tensor() -> None:
    x = sparse_input(4)
    layer = SubMConv3d(4, 5, 3, indice_key="a")
    counted = SparseConvTensor(x.features, x.indices, x.spatial_shape, x.indices[:, 0].max() + 1)
    assert torch.equal(layer(counted).features, layer(x).features)


def test_voxels_are_sorted_again_for_another_grid() -> None:
    x = sparse_input(4)
    SubMConv3d(4, 4, 3, indice_key="a")(x)
    wider = x.replace_feature(x.features)
    wider.spatial_shape = [size + 3 for size in x.spatial_shape]
    layer = SubMConv3d(4, 4, 3, indice_key="b")
    with reference_kernels():
        expected = layer(_fresh(wider))
    assert torch.equal(layer(wider).features, expected.features)


@pytest.mark.parametrize("is_sorted", [True, False])
def test_an_inverse_convolution_undoes_a_pooling_of_spconv(is_sorted: bool) -> None:
    x = sparse_input(4)
    if not is_sorted:
        order = torch.randperm(len(x.indices), generator=torch.Generator().manual_seed(0))
        x = SparseConvTensor(x.features[order], x.indices[order], x.spatial_shape, x.batch_size)
    x.indices = x.indices.contiguous()
    stem, up = SubMConv3d(4, 4, 3, indice_key="stem"), SparseInverseConv3d(4, 6, 3, indice_key="pool")
    network = nn.Sequential(stem, SparseMaxPool3d(3, 2, 1, indice_key="pool", algo=ConvAlgo.Native), up)

    def results() -> list[Tensor]:
        out = x
        for layer in network:
            out = layer(out)
        assert torch.equal(out.indices, x.indices)
        return [out.features, *torch.autograd.grad(out.features.square().sum(), list(network.parameters()))]

    ours = results()
    x = _fresh(x)
    with reference_kernels():
        expected = results()
    assert torch.equal(ours[0], expected[0])
    for found, wanted in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
