"""MACs and stored sizes against counting by hand."""

import pytest
import torch
from torch import nn

from cpq_train.quantization.costs import LayerCost, bit_macs, count_costs, stored_mib
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d

COORDS = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2], [0, 5, 5, 5], [1, 1, 1, 1]], dtype=torch.int32)


def test_macs_of_sparse_layers_are_pairs_of_voxels() -> None:
    network = nn.ModuleDict(
        {
            "same": SubMConv3d(3, 5, 3, padding=1, bias=False, indice_key="a"),
            "strided": SparseConv3d(5, 2, 3, stride=2, padding=1, bias=False, indice_key="b"),
            "inverse": SparseInverseConv3d(2, 3, 3, indice_key="b", bias=False),
            "cell": SubMConv3d(3, 4, 1, bias=False),
            "keyless": SubMConv3d(4, 4, 3, padding=1, bias=False),
        }
    )

    def run() -> int:
        x = SparseConvTensor(torch.randn(4, 3), COORDS, [8, 8, 8], 2)
        for layer in network.values():
            x = layer(x)
        return 2

    costs = count_costs(network, network.keys(), run)
    # Each voxel meets itself; the two neighbours meet each other.
    assert costs["same"] == LayerCost(3 * 5 * 27, (4 + 2) * 3 * 5 / 2)
    # At stride 2 and padding 1 an odd coordinate lies in two windows of its axis, an even one in one.
    windows = 8 + 4 + 8 + 8
    assert costs["strided"] == LayerCost(5 * 2 * 27, windows * 5 * 2 / 2)
    assert costs["inverse"] == LayerCost(2 * 3 * 27, windows * 2 * 3 / 2)  # the same pairs, read backwards
    assert costs["cell"] == LayerCost(3 * 4, 4 * 3 * 4 / 2)
    assert costs["keyless"] == LayerCost(4 * 4 * 27, (4 + 2) * 4 * 4 / 2)


def test_macs_of_dense_layers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 6, 2, stride=2))
    costs = count_costs(network, ["0", "1"], lambda: len(network(torch.randn(2, 3, 9, 9))))
    assert costs["0"] == LayerCost(3 * 4 * 9, 4 * 4 * 3 * 4 * 9)
    assert costs["1"] == LayerCost(4 * 6 * 4, 4 * 4 * 4 * 6 * 4)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9), 7 * 6 * 2 * 3),
        (nn.Conv2d(4, 6, 2, padding="same", groups=2), (1, 4, 9, 8), 9 * 8 * 6 * 2 * 4),
        (nn.Conv2d(4, 6, 3), (4, 9, 8), 7 * 6 * 4 * 6 * 9),
        (nn.Conv3d(4, 6, 2), (1, 4, 5, 6, 7), 4 * 5 * 6 * 4 * 6 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 7), 5 * 7 * 4 * 3 * 9),
        (nn.Linear(4, 6), (1, 3, 5, 4), 3 * 5 * 4 * 6),
        (nn.Linear(4, 6), (4,), 4 * 6),
    ],
)
def test_macs_of_groups_and_of_single_samples(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    def run() -> int:
        layer(input=torch.randn(shape))
        return 1

    assert count_costs(layer, [""], run)[""].num_macs == macs


def test_a_residual_add_costs_nothing() -> None:
    network = nn.ModuleDict({"add": ResidualAdd()})
    x = torch.ones(3, 2)
    assert count_costs(network, ["add"], lambda: len(network["add"](x, x))) == {"add": LayerCost(0, 0.0)}


def test_bits_weigh_the_costs() -> None:
    cost, off = LayerCost(2**20, 10.0), QuantizerScheme(mode="off")
    w4a8 = LayerScheme(QuantizerScheme(bits=4), QuantizerScheme(bits=8))
    assert (stored_mib(cost, w4a8), bit_macs(cost, w4a8)) == (0.5, 320.0)
    weight_only = LayerScheme(QuantizerScheme(bits=4), off)
    assert (stored_mib(cost, weight_only), bit_macs(cost, weight_only)) == (0.5, 1280.0)
    assert (stored_mib(cost, LayerScheme(off, off)), bit_macs(cost, LayerScheme(off, off))) == (4.0, 10240.0)
