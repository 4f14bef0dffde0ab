"""The 8-bit kernel gives the bits of any other exact sum, and layers use it only where it applies."""

import pytest
import torch
from torch import nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics import int8_kernel
from cpq_train.quantization.numerics.int8_kernel import Geometry
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme

PLAIN = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
INT8 = LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme())

needs_kernel = pytest.mark.skipif(
    not int8_kernel.IS_AVAILABLE, reason="this CPU has no VNNI, or this PyTorch no qconv_pointwise"
)


def _codes(*shape: int, low: int, extreme: bool) -> torch.Tensor:
    if extreme:
        return torch.full(shape, 127.0)
    return torch.randint(low, 128, shape).float()


@needs_kernel
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "kernel", "geometry"),
    [
        (16, 3, 3, PLAIN),
        (256, 8, 3, PLAIN),
        (32, 64, 3, PLAIN._replace(stride=(2, 2), padding=(0, 0))),
        (24, 5, 1, PLAIN._replace(padding=(0, 0))),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sums_are_exact(
    channels_in: int,
    channels_out: int,
    kernel: int,
    geometry: Geometry,
    extreme: bool,
    memory_format: torch.memory_format,
) -> None:
    """`extreme` sums pass 2^24 where there are 1041 products or more: then they are rounded once."""
    torch.manual_seed(0)
    x = _codes(2, channels_in, 13, 12, low=0, extreme=extreme).to(memory_format=memory_format)
    w = _codes(channels_out, channels_in, kernel, kernel, low=-128, extreme=extreme)
    assert int8_kernel.takes(x, w, 127, 128, geometry)
    exact = torch.convolution(x.double(), w.double(), None, *geometry).float()
    packed = int8_kernel.pack(w, geometry, x.shape)
    assert torch.equal(int8_kernel.convolve(x, packed, geometry), exact)
    assert torch.equal(int8_kernel.convolve(x.to(torch.uint8), packed, geometry), exact)


def test_what_it_does_not_take() -> None:
    x, w = torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3)
    assert int8_kernel.takes(x, w, 127, 128, PLAIN) == int8_kernel.IS_AVAILABLE
    assert not int8_kernel.takes(-x, w, 127, 128, PLAIN)
    assert not int8_kernel.takes(x, w, 255, 128, PLAIN)
    assert not int8_kernel.takes(x, w, 127, 32768, PLAIN)
    assert not int8_kernel.takes(x, w, 127, 128, PLAIN._replace(transposed=True))
    assert not int8_kernel.takes(x[:0], w, 127, 128, PLAIN)


@needs_kernel
def test_a_layer_has_the_same_bits_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(160, 24, 3, padding=1)
    quantize_layer(layer, INT8)
    with collecting_ranges(layer):
        layer(torch.rand(2, 160, 9, 9))
    results = []
    for available in (True, False):
        monkeypatch.setattr(int8_kernel, "IS_AVAILABLE", available)
        x = torch.rand(2, 160, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, layer.weight, layer.bias))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
