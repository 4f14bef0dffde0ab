"""Sums of wide codes are exact whole numbers, with the gradients of a plain convolution."""

import pytest
import torch
from torch import nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics.exact_sum import Axes, exact_sum
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.sparse import SparseConvTensor, SubMConv3d

AXES = Axes(output=0, input=1)


def _codes(fmt: IntegerFormat, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(fmt.bits)
    return torch.randint(fmt.qmin, fmt.qmax + 1, shape, generator=generator).float()


@pytest.mark.parametrize("x_bits", [2, 8, 9, 16])
@pytest.mark.parametrize("w_bits", [4, 8, 12, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_equals_whole_numbers(x_bits: int, w_bits: int, signed: bool) -> None:
    x_format, w_format = IntegerFormat(x_bits, signed), IntegerFormat(w_bits)
    x, w = _codes(x_format, 2, 96, 5, 5), _codes(w_format, 3, 96, 3, 3)
    result = exact_sum(x, w, x_format, w_format, nn.functional.conv2d, AXES)
    whole = nn.functional.conv2d(x.double(), w.double())  # below 2^53
    assert torch.equal(result, whole.float())


def test_wide_sums_have_the_gradient_of_the_convolution() -> None:
    fmt = IntegerFormat(16)
    x, w = _codes(fmt, 1, 4, 5, 5).requires_grad_(), _codes(fmt, 2, 4, 3, 3).requires_grad_()
    ours = torch.autograd.grad(exact_sum(x, w, fmt, fmt, nn.functional.conv2d, AXES).sum(), (x, w))
    theirs = torch.autograd.grad(nn.functional.conv2d(x, w).sum(), (x, w))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_16_bit_layer_is_closer_to_float_than_an_8_bit_one() -> None:
    coords = torch.tensor([[0, z, y, x] for z in range(4) for y in range(4) for x in range(4)]).int()
    torch.manual_seed(0)
    x = SparseConvTensor(torch.randn(64, 8), coords, [4, 4, 4], 1)
    errors = []
    for bits in (8, 16):
        torch.manual_seed(1)
        layer = SubMConv3d(8, 6, 3, padding=1, bias=True, indice_key="k")
        reference = layer(x).features.detach()
        weight = QuantizerScheme(bits=bits, granularity="per_channel")
        quantize_layer(layer, LayerScheme(weight, QuantizerScheme(bits=bits)))
        with collecting_ranges(layer):
            layer(x)
        out = layer(x).features
        out.sum().backward()
        assert layer.weight.grad.isfinite().all()
        errors.append(float((out - reference).abs().max()))
    assert errors[1] < errors[0] / 100
