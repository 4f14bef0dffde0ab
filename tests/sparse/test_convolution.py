"""Sparse convolutions against dense ones."""

import pytest
import torch
from sparse_grids import DEVICES, SHAPE, at_voxels, dense, dense_reference, sparse_input
from torch.nn import functional as F

from cpq_train.common.errors import UserError
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SparseSequential, SubMConv3d
from cpq_train.sparse.rulebook import find_or_build, num_pairs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
def test_submanifold_equals_dense_at_its_voxels(device: str, training: bool) -> None:
    layer = SubMConv3d(5, 16, 3, padding=1, indice_key="a").to(device).train(training)
    x = sparse_input(5, device)
    out = layer(x)
    torch.testing.assert_close(out.indices, x.indices, rtol=0, atol=0)
    expected = at_voxels(dense_reference(x, layer.weight), x.indices) + layer.bias
    torch.testing.assert_close(out.features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
def test_strided_equals_dense_and_keeps_touched_sites(device: str, training: bool) -> None:
    layer = SparseConv3d(8, 16, 3, stride=2, padding=1, bias=True, indice_key="b").to(device).train(training)
    x = sparse_input(8, device)
    out = layer(x)
    expected = dense_reference(x, layer.weight, stride=2)
    assert out.spatial_shape == list(expected.shape[2:])
    torch.testing.assert_close(
        out.features, at_voxels(expected, out.indices) + layer.bias, rtol=1e-4, atol=1e-4
    )
    ones = x.replace_feature(torch.ones_like(x.features[:, :1]))
    touched = dense_reference(ones, torch.ones_like(layer.weight[:1, ..., :1]), stride=2)[:, 0] > 0
    assert len(out.indices) == int(touched.sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_pairs_are_what_a_sum_of_ones_counts(device: str, kind: type[SubMConv3d | SparseConv3d]) -> None:
    stride = 1 if kind is SubMConv3d else 2
    layer = kind(8, 8, 3, stride=stride, padding=1, bias=False, indice_key="a").to(device)
    x = sparse_input(8, device)
    ones = x.replace_feature(torch.ones_like(x.features))
    met = layer.convolve(ones, torch.ones_like(layer.weight)).features
    assert num_pairs(find_or_build(layer, ones)) == int(met.sum()) // (8 * 8)


def test_train_and_eval_are_bit_equal_with_a_bias() -> None:
    layer = SubMConv3d(5, 16, 3, padding=1, indice_key="a")
    x = sparse_input(5)
    assert torch.equal(layer.train()(x).features, layer.eval()(x).features)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_gradients_equal_dense(device: str, kind: type[SubMConv3d | SparseConv3d]) -> None:
    stride = 1 if kind is SubMConv3d else 2
    layer = kind(6, 8, 3, stride=stride, padding=1, bias=False, indice_key="a").to(device).eval()
    x = sparse_input(6, device)
    leaf = x.features.clone().requires_grad_()
    out = layer(x.replace_feature(leaf))
    probe = torch.randn_like(out.features)
    grads = torch.autograd.grad((out.features * probe).sum(), [leaf, layer.weight])
    expected = at_voxels(dense_reference(x.replace_feature(leaf), layer.weight, stride), out.indices)
    expected_grads = torch.autograd.grad((expected * probe).sum(), [leaf, layer.weight])
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_convolve_takes_another_weight_and_slices_of_channels(kind: type[SubMConv3d | SparseConv3d]) -> None:
    layer = kind(6, 8, 3, padding=1, stride=1 if kind is SubMConv3d else 2, indice_key="a")
    x = sparse_input(6)
    weight = torch.randn_like(layer.weight)
    whole = layer.convolve(x, weight)
    left = layer.convolve(x.replace_feature(x.features[:, :2]), weight[..., :2])
    right = layer.convolve(x.replace_feature(x.features[:, 2:]), weight[..., 2:])
    assert left.indices is right.indices or torch.equal(left.indices, right.indices)
    assert torch.equal(left.indices, whole.indices)
    torch.testing.assert_close(left.features + right.features, whole.features, rtol=1e-4, atol=1e-4)


def test_integer_codes_give_exact_sums() -> None:
    layer = SubMConv3d(16, 8, 3, padding=1, bias=False, indice_key="a")
    x = sparse_input(16)
    codes = (x.features * 40).round().clamp(-128, 127)
    weight = torch.randint(-128, 128, layer.weight.shape).float()
    out = layer.convolve(x.replace_feature(codes), weight)
    expected = dense_reference(x.replace_feature(codes.double()), weight.double())
    assert torch.equal(out.features.double(), at_voxels(expected, x.indices))


def test_one_key_builds_one_rulebook_and_refuses_other_kernels() -> None:
    first = SubMConv3d(5, 5, 3, padding=1, indice_key="a")
    x = sparse_input(5)
    first(x)
    rulebook = x.indice_dict["a"]
    SubMConv3d(5, 5, 3, padding=1, indice_key="a")(first(x))
    assert x.indice_dict["a"] is rulebook
    with pytest.raises(UserError, match=r"SubMConv3d\(.*indice key 'a'.*ksize \[3, 3, 3\]"):
        SubMConv3d(5, 5, 5, padding=2, indice_key="a")(x)
    moved, wider = x.replace_feature(x.features), x.replace_feature(x.features)
    moved.indices, wider.spatial_shape = x.indices.flip(0), [20, 20, 20]
    for other in (moved, wider):
        with pytest.raises(UserError, match=r"indice key 'a'.*other voxels"):
            first(other)


def test_autocast_leaves_the_sum_alone() -> None:
    layer = SubMConv3d(5, 16, 3, padding=1, indice_key="a")
    x = sparse_input(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x).features
    assert torch.equal(inside, layer(x).features)


@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
def test_no_voxels_in_none_out(kind: type[SubMConv3d | SparseConv3d]) -> None:
    stride = 1 if kind is SubMConv3d else 2
    layer = kind(5, 16, 3, padding=1, stride=stride, indice_key="a")
    x = SparseConvTensor(torch.zeros(0, 5), torch.zeros((0, 4), dtype=torch.int32), list(SHAPE), 1)
    out = layer(x)
    assert out.features.shape == (0, 16)
    assert dense(out).shape[2:] == dense_reference(sparse_input(5), layer.weight, stride).shape[2:]
    out.features.sum().backward()
    assert float(layer.weight.grad.abs().max()) == 0


def test_sequential_and_residual_add() -> None:
    x = sparse_input(5)
    net = SparseSequential(SubMConv3d(5, 4, 3, padding=1, indice_key="a"), torch.nn.ReLU())
    assert bool((net(x).features >= 0).all())
    assert torch.equal(ResidualAdd()(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("kind", [SubMConv3d, SparseConv3d])
@pytest.mark.parametrize(("num_in", "num_out"), [(5, 4), (5, 16), (16, 16), (16, 3)])
def test_a_sum_does_not_depend_on_other_voxels(
    kind: type[SubMConv3d | SparseConv3d], num_in: int, num_out: int
) -> None:
    """Each of many samples of one or two voxels, alone and in a batch of all, on the CPU: the same bits."""
    layer = kind(num_in, num_out, 3, stride=1 if kind is SubMConv3d else 2, padding=1, bias=False)
    generator = torch.Generator().manual_seed(0)
    zyx = torch.randint(1, 8, (40, 3), generator=generator).int()
    places = [torch.cat([cell, cell + 1]) for cell in zyx.split(1)]
    features = torch.randn((40, 2, num_in), generator=generator)
    coords = torch.cat([F.pad(place, (1, 0), value=sample) for sample, place in enumerate(places)])
    together = layer(SparseConvTensor(features.flatten(0, 1), coords, list(SHAPE), 40))
    rows = {tuple(cell): row for cell, row in zip(together.indices.tolist(), together.features, strict=True)}
    for sample, place in enumerate(places):
        alone = layer(SparseConvTensor(features[sample], F.pad(place, (1, 0)), list(SHAPE), 1))
        for (_, *cell), row in zip(alone.indices.tolist(), alone.features, strict=True):
            assert torch.equal(row, rows[(sample, *cell)])
