"""torch.compile and torch.export of prepared dense networks: the bits of the network itself."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme


def _of_every_kind() -> tuple[nn.Module, Tensor]:
    """BatchNorm to fold, groups, an uneven padding, a transposed convolution, Linear."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU()),
        *(nn.Conv2d(6, 4, 2, padding="same", groups=2), nn.ReLU(), nn.Flatten()),
        nn.Linear(4 * 10 * 10, 5),
    )
    return network, torch.rand(2, 3, 5, 5)


def _of_wide_sums() -> tuple[nn.Module, Tensor]:
    """The largest codes of 256 channels of 3x3 would pass 2^24; those of the codes that there are do not."""
    return nn.Sequential(nn.Conv2d(256, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)), torch.rand(
        1, 256, 4, 4
    )


NETWORKS = {"every kind": _of_every_kind, "wide sums": _of_wide_sums}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "accumulator": {"defaults": {"bias": "accumulator"}},
    "w12a16": {"defaults": {"weight": {"bits": 12}, "input": {"bits": 16}}},
    "dynamic": {"defaults": {"input": {"mode": "dynamic"}}},
}


def _prepared(network: str, scheme: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers, x = NETWORKS[network]()
    layers.eval()
    prepare(layers, Scheme.from_dict(SCHEMES[scheme]), x)
    with collecting_ranges(layers):
        layers(x)
    return layers, x * 1.2


@pytest.mark.parametrize(
    ("network", "scheme"),
    [
        *(("every kind", "int8"), ("every kind", "accumulator")),
        *(("wide sums", "int8"), ("wide sums", "w12a16"), ("wide sums", "dynamic")),
    ],
)
def test_an_exported_program_has_the_same_bits(network: str, scheme: str) -> None:
    layers, x = _prepared(network, scheme)
    program = torch.export.export(layers, (x,), strict=False)
    assert torch.equal(program.module()(x), layers(x))


@pytest.mark.parametrize("scheme", ["dynamic", "int8"])
def test_an_exported_program_can_be_saved(scheme: str) -> None:
    layers, x = _prepared("wide sums", scheme)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layers, (x,), strict=False), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layers(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_network_has_the_same_bits_and_gradients(network: str) -> None:
    layers, x = _prepared(network, "int8")
    torch.compiler.reset()
    results = []
    for forward in (layers, torch.compile(layers, backend="aot_eager")):
        source = x.clone().requires_grad_()
        y = forward(source)
        gradients = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [source, *layers.parameters()]
        )
        results.append((y, gradients))
    (ours, ours_grad), (compiled, compiled_grad) = results
    assert torch.equal(ours, compiled)
    for a, b in zip(ours_grad, compiled_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * a.abs().max().item())
