"""Inverse convolutions against spconv's own and against dense transposed ones."""

import pytest
import torch
from sparse_grids import DEVICES, SHAPE, at_voxels, dense, grid_order, sparse_input
from spconv import pytorch as spconv
from spconv.core import ConvAlgo
from torch import Tensor, nn
from torch.nn import functional as F

from cpq_train.common.errors import UserError
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d

GEOMETRIES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1, 2), "stride": (2, 1, 2), "padding": (1, 0, 0)},
    {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2},
]


def _pair(geometry: dict[str, object], device: str = "cpu", **more: object) -> tuple[nn.Module, nn.Module]:
    down = SparseConv3d(5, 8, **geometry, indice_key="down", **more).to(device)
    return down, SparseInverseConv3d(8, 6, geometry["kernel_size"], indice_key="down", **more).to(device)


def _results(down: nn.Module, up: nn.Module, x: SparseConvTensor) -> tuple[SparseConvTensor, list[Tensor]]:
    """The output, and gradients of the features between the layers (by place) and of the weight and bias."""
    middle = down(x)
    leaf = middle.features.detach().requires_grad_()
    out = up(middle.replace_feature(leaf))
    probe = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    of_leaf, *others = torch.autograd.grad((out.features * probe).sum(), [leaf, *up.parameters()])
    return out, [of_leaf[grid_order(middle)], *others]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_spconv(geometry: dict[str, object]) -> None:
    down, up = _pair(geometry)
    theirs = [
        spconv.SparseConv3d(5, 8, **geometry, indice_key="down", algo=ConvAlgo.Native),
        spconv.SparseInverseConv3d(8, 6, geometry["kernel_size"], indice_key="down", algo=ConvAlgo.Native),
    ]
    for their, our in zip(theirs, (down, up), strict=True):
        their.load_state_dict(our.state_dict())
    x = sparse_input(5)
    x.indices = x.indices.contiguous()
    (expected, expected_grads), (out, grads) = _results(*theirs, x), _results(down, up, sparse_input(5))
    assert torch.equal(out.features, expected.features)
    assert torch.equal(out.indices, expected.indices)
    assert out.spatial_shape == expected.spatial_shape == list(SHAPE)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_a_dense_transposed_convolution(
    geometry: dict[str, object], training: bool, device: str
) -> None:
    down, up = _pair(geometry, device)
    x = sparse_input(5, device)
    middle = down.train(training)(x)
    out = up.train(training)(middle)
    weight = up.weight.permute(4, 0, 1, 2, 3)
    steps = {name: geometry[name] for name in ("stride", "padding", "dilation") if name in geometry}
    least = F.conv_transpose3d(dense(middle), weight, **steps).shape[2:]
    extra = [want - has for want, has in zip(SHAPE, least, strict=True)]
    expected = F.conv_transpose3d(dense(middle), weight, **steps, output_padding=extra)
    assert out.indices is x.indices
    torch.testing.assert_close(out.features, at_voxels(expected, x.indices) + up.bias, rtol=1e-4, atol=1e-4)


def test_convolve_takes_slices_of_channels() -> None:
    down, up = _pair(GEOMETRIES[0])
    x = down(sparse_input(5))
    whole = up.convolve(x, up.weight)
    left = up.convolve(x.replace_feature(x.features[:, :3]), up.weight[..., :3])
    right = up.convolve(x.replace_feature(x.features[:, 3:]), up.weight[..., 3:])
    torch.testing.assert_close(left.features + right.features, whole.features, rtol=1e-4, atol=1e-4)


def test_no_voxels_in_none_out() -> None:
    down, up = _pair(GEOMETRIES[0])
    x = SparseConvTensor(torch.zeros(0, 5), torch.zeros((0, 4), dtype=torch.int32), list(SHAPE), 1)
    out = up(down(x))
    assert out.features.shape == (0, 6)
    assert out.spatial_shape == list(SHAPE)
    out.features.sum().backward()
    assert float(up.weight.grad.abs().max()) == 0


def test_voxels_that_a_strided_layer_dropped_come_back_as_the_bias() -> None:
    """Padding 0 drops the last layer of an even grid: nothing passes, and the inverse has every voxel."""
    geometry = {"kernel_size": 3, "stride": 2, "padding": (0, 1, 1)}
    down, up = _pair(geometry)
    x = SparseConvTensor(torch.ones(1, 5), torch.tensor([[0, 7, 5, 5]]).int(), [8, 20, 20], 1)
    assert len(down(x).features) == 0
    assert torch.equal(up(down(x)).features, up.bias[None])


def test_what_does_not_fit_is_refused() -> None:
    down, up = _pair(GEOMETRIES[0])
    middle = down(sparse_input(5))
    with pytest.raises(UserError, match=r"SparseInverseConv3d\(8, 6.*'up': there is no rulebook.*: down"):
        SparseInverseConv3d(8, 6, 3, indice_key="up")(middle)
    with pytest.raises(UserError, match=r"ksize \[3, 3, 3\], the layer \[2, 2, 2\]"):
        SparseInverseConv3d(8, 6, 2, indice_key="down")(middle)
    with pytest.raises(UserError, match="other voxels"):
        SparseInverseConv3d(6, 6, 3, indice_key="down")(up(middle))
    same = SubMConv3d(8, 8, 3, indice_key="same")(middle)
    with pytest.raises(UserError, match="of a submanifold layer"):
        SparseInverseConv3d(8, 6, 3, indice_key="same")(same)
    with pytest.raises(UserError, match="of a strided layer"):
        SubMConv3d(8, 8, 3, padding=1, indice_key="down")(middle)
