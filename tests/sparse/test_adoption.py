"""spconv's layers made ours compute what they computed, or say why they stay."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from cumm import tensorview as tv
from small_unet import SmallUNet, unet_inputs
from sparse_grids import grid_order, sparse_input
from spconv import pytorch as spconv
from spconv.core import ConvAlgo
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cpq_train.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SubMConv3d,
    adopt,
    why_not_adopted,
)

SETTINGS = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 3, "padding": 0},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1, 5), "stride": (1, 2, 3), "padding": (0, 0, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 1},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": 1, "stride": 2},
]


def _contiguous(x: SparseConvTensor) -> SparseConvTensor:
    x.indices = x.indices.contiguous()  # spconv misreads others
    return x


def _results(layer: nn.Module) -> tuple[SparseConvTensor, list[Tensor]]:
    """The output in the order of the grid, and gradients of features and parameters."""
    x = _contiguous(sparse_input(5))
    leaf = x.features.requires_grad_()
    out = layer(x)
    rows = grid_order(out)
    out = out.replace_feature(out.features[rows])
    out.indices = out.indices[rows]
    probe = torch.randn(out.features.shape, generator=torch.Generator().manual_seed(0))
    return out, list(torch.autograd.grad((out.features * probe).sum(), [leaf, *layer.parameters()]))


@pytest.mark.parametrize("key", [None, "a"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", [spconv.SubMConv3d, spconv.SparseConv3d])
def test_adopted_layers_compute_the_same(
    kind: type[nn.Module], settings: dict[str, object], key: str | None
) -> None:
    layer = kind(5, 7, **settings, indice_key=key, algo=ConvAlgo.Native)
    expected, (features_grad, weight_grad, *bias_grad) = _results(layer)
    assert adopt(layer) == [""]
    assert type(layer) in (SubMConv3d, SparseConv3d)
    out, grads = _results(layer)
    assert torch.equal(out.indices, expected.indices)
    assert list(out.spatial_shape) == list(expected.spatial_shape)
    torch.testing.assert_close(out.features, expected.features, rtol=1e-5, atol=1e-6)
    if layer.conv1x1:  # spconv keeps the numbers of this weight in another order
        weight_grad = weight_grad.reshape(5, 7).T.reshape(weight_grad.shape)
    for grad, expected_grad in zip(grads, [features_grad, weight_grad, *bias_grad], strict=True):
        torch.testing.assert_close(
            grad, expected_grad, rtol=1e-5, atol=1e-6 * float(expected_grad.abs().max())
        )


def test_an_inverse_layer_of_one_cell_keeps_the_voxels_as_spconv_does() -> None:
    network = nn.Sequential(
        spconv.SparseConv3d(5, 8, 1, stride=2, indice_key="a", algo=ConvAlgo.Native),
        spconv.SparseInverseConv3d(8, 6, 1, indice_key="a", algo=ConvAlgo.Native),
    )
    expected = network(_contiguous(sparse_input(5)))
    assert adopt(network) == ["0", "1"]
    out = network(sparse_input(5))
    assert torch.equal(out.indices, expected.indices)
    torch.testing.assert_close(out.features, expected.features)


def test_a_unet_computes_the_same_beside_pooling() -> None:
    torch.manual_seed(0)
    network, inputs = SmallUNet(), unet_inputs()
    expected = copy.deepcopy(network)(*inputs)
    names = adopt(network)
    assert len(names) == 9
    assert sum(isinstance(m, SparseInverseConv3d) for m in network.modules()) == 2
    assert adopt(network) == []
    torch.testing.assert_close(network(*inputs), expected, rtol=1e-4, atol=1e-5)
    network(*inputs).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
    assert network.eval()(*inputs).shape == (len(inputs[0]), 3)


def test_state_dicts_fit_before_and_after() -> None:
    torch.manual_seed(0)
    network, fresh = SmallUNet(), SmallUNet()
    state, inputs = copy.deepcopy(network.state_dict()), unet_inputs()
    adopt(network)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    fresh.load_state_dict(network.state_dict())
    torch.testing.assert_close(fresh.train()(*inputs), copy.deepcopy(network)(*inputs), rtol=1e-4, atol=1e-5)
    other = SmallUNet()
    adopt(other)
    other.load_state_dict(state)
    for same in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(same.eval()(*inputs), network.eval()(*inputs))


def test_a_weight_that_two_layers_share_is_turned_once() -> None:
    network = nn.Sequential(*(spconv.SubMConv3d(5, 5, 1, bias=False) for _ in range(2)))
    network[1].weight = network[0].weight
    expected = network(sparse_input(5)).features
    adopt(network)
    torch.testing.assert_close(network(sparse_input(5)).features, expected)


class _Named(spconv.SubMConv3d):
    """A subclass that only fixes arguments."""

    def __init__(self) -> None:
        super().__init__(5, 5, 3, padding=1)


class _Doubling:
    def forward(self, x: SparseConvTensor) -> SparseConvTensor:
        return x.replace_feature(2 * x.features)


class _Doubled(_Doubling, spconv.SubMConv3d):
    pass


def _activated() -> nn.Module:
    layer = spconv.SubMConv3d(5, 5, 3)
    layer.act_type = tv.gemm.Activation.ReLU
    return layer


def _replaced() -> nn.Module:
    layer = spconv.SubMConv3d(5, 5, 3)
    layer.forward = lambda x: x
    return layer


REFUSED: dict[str, Callable[[], nn.Module]] = {
    r"_Doubled has code of its own \(forward\)": lambda: _Doubled(5, 5, 3),
    r"SubMConv3d has code of its own \(forward\)": _replaced,
    r"ParametrizedSubMConv3d has code of its own \(.*weight\)": lambda: parametrizations.weight_norm(
        spconv.SubMConv3d(5, 5, 3)
    ),
    "its weight is no parameter": lambda: nn.utils.spectral_norm(spconv.SubMConv3d(5, 5, 3)),
    "an activation itself .*ReLU": _activated,
    "fp32_accum True": lambda: spconv.SparseConv3d(5, 5, 3, fp32_accum=True),
    "record_voxel_count": lambda: spconv.SparseConv3d(5, 5, 3, record_voxel_count=True),
    "SparseConvTranspose3d is none of SubMConv3d, ": lambda: spconv.SparseConvTranspose3d(5, 5, 3),
    "SubMConv2d is none of SubMConv3d, ": lambda: spconv.SubMConv2d(5, 5, 3),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_ours_would_compute_otherwise_stays(reason: str) -> None:
    network = nn.Sequential(_Named(), REFUSED[reason](), SubMConv3d(5, 5, 3))
    kind = type(network[1])
    assert adopt(network) == ["0"]
    assert type(network[0]) is SubMConv3d
    assert type(network[1]) is kind
    assert [why_not_adopted(layer) == "" for layer in network] == [True, False, True]
    assert re.search(reason, why_not_adopted(network[1]))


def test_layers_share_a_key_whatever_their_padding() -> None:
    """A submanifold layer's stride and padding mean nothing, and equal voxels may lie in another tensor."""
    first, second = (SubMConv3d(5, 5, 3, padding=p, stride=p + 1, indice_key="a") for p in (1, 0))
    x = sparse_input(5)
    middle = first(x)
    rulebook = x.indice_dict["a"]
    middle.indices = middle.indices.clone()
    second(middle)
    assert x.indice_dict["a"] is rulebook


@pytest.mark.parametrize(("num_in", "num_out"), [(5, 3), (64, 3), (64, 40), (16, 16)])
def test_a_layer_of_one_cell_depends_on_its_voxel_alone(num_in: int, num_out: int) -> None:
    layer = SubMConv3d(num_in, num_out, 1)
    x = sparse_input(num_in)
    for row in range(20):
        alone = SparseConvTensor(
            x.features[row : row + 1], x.indices[row : row + 1], x.spatial_shape, x.batch_size
        )
        assert torch.equal(layer(alone).features[0], layer(x).features[row])
