"""Small calibrated networks, dense and sparse, with their float twins."""

from typing import Any

import torch
from torch import Tensor, nn

from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ptq.twins import Twins
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SparseSequential, SubMConv3d


def scheme(
    weight: dict[str, Any] | None = None, input: dict[str, Any] | None = None, bias: str = "float"
) -> Scheme:
    """4-bit weights, 8-bit inputs, unless told otherwise."""
    both = {"weight": {"bits": 4, **(weight or {})}, "input": {"bits": 8, **(input or {})}}
    return Scheme.from_dict({"defaults": {**both, "bias": bias}})


def _trained_looking(network: nn.Module) -> nn.Module:
    """Weights three times their initial size: outputs of the size that those of a trained network have."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(3.0)
    return network


def dense_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.ConvTranspose2d(12, 8, 2, stride=2), nn.ReLU()),
        nn.Conv2d(8, 3, 3, padding=1, bias=False),
    )
    return _trained_looking(layers)


def dense_batches(num: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Channels that depend on each other, as those of a network do: then rounding to the nearest is not best.
    mix = torch.randn(4, 2, generator=generator)
    return [
        torch.einsum("oc,bchw->bohw", mix, torch.randn(2, 2, 8, 8, generator=generator)) + 0.5
        for _ in range(num)
    ]


def sparse_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        SparseSequential(SubMConv3d(4, 12, 3, padding=1, bias=False, indice_key="a"), nn.ReLU()),
        SparseSequential(SparseConv3d(12, 8, 3, stride=2, padding=1, indice_key="b")),
    )
    return _trained_looking(layers)


def sparse_batches(num: int = 2) -> list[SparseConvTensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(2, 4, generator=generator)
    batches = []
    for _ in range(num):
        coords = torch.unique(torch.randint(0, 6, (80, 3), generator=generator), dim=0)
        coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
        features = torch.randn(len(coords), 2, generator=generator) @ mix + 0.5
        batches.append(SparseConvTensor(features, coords, [6, 6, 6], 1))
    return batches


NETWORKS = {"dense": (dense_network, dense_batches), "sparse": (sparse_network, sparse_batches)}


def run(network: nn.Module, batch: Any) -> Any:
    return network(_fresh(batch))


def _fresh(batch: Any) -> Any:
    if isinstance(batch, SparseConvTensor):
        return SparseConvTensor(batch.features, batch.indices, batch.spatial_shape, batch.batch_size)
    return batch


def calibrated(kind: str, chosen: Scheme | None = None) -> Twins:
    """A quantized network with its ranges, and its twin."""
    new_network, new_batches = NETWORKS[kind]
    return twins_of(new_network(), new_batches(), chosen or scheme())


def twins_of(network: nn.Module, batches: list[Any], chosen: Scheme) -> Twins:
    network.eval()
    prepare(network, chosen, _fresh(batches[0]))
    with collecting_ranges(network):
        for batch in batches:
            run(network, batch)
    return Twins.of(network, batches, run)
