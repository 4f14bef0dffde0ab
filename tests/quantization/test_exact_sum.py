"""Sums of wide codes are exact whole numbers, with the gradients of a plain convolution."""

import pytest
import torch
from torch import nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics.exact_sum import Axes, Codes, Convolve, exact_sum, num_exact_parts
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
    result = exact_sum(x, w, x_format, w_format, nn.functional.conv2d, AXES).values
    whole = nn.functional.conv2d(x.double(), w.double())  # below 2^53
    assert torch.equal(result, whole.float())


def _in_groups(transposed: bool) -> Convolve:
    convolve = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
    return lambda x, w: convolve(x, w, groups=3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_sum_in_groups_is_split_within_each(bits: int, transposed: bool) -> None:
    fmt, convolve = IntegerFormat(bits), _in_groups(transposed)
    least = fmt.qmax // 2
    x = _codes(fmt, 2, 3 * 250, 3, 3).abs().clamp(min=least)
    w = _codes(fmt, *((3 * 250, 2) if transposed else (3 * 2, 250)), 3, 3).abs().clamp(min=least)
    axes = Axes(output=int(transposed), input=int(not transposed), feature=-3, groups=3)
    assert num_exact_parts(Codes.of(x, fmt), Codes.of(w, fmt), axes) != 1
    whole = convolve(x.double(), w.double())
    assert torch.equal(exact_sum(x, w, fmt, fmt, convolve, axes).values, whole.float())


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_are_not_added_up_for_the_bound(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """250 channels of 3x3 codes of 127 need three parts, however many groups there are."""
    fmt = IntegerFormat()
    x = torch.full((1, 3 * 250, 3, 3), 127.0)
    w = torch.full((3 * 250, 2, 3, 3) if transposed else (3 * 2, 250, 3, 3), 127.0)
    axes = Axes(output=int(transposed), input=int(not transposed), feature=-3, groups=3)
    for is_traced in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=is_traced: value)
        assert num_exact_parts(Codes.of(x, fmt), Codes.of(w, fmt), axes) == 3


def test_one_channel_alone_passes_fp32() -> None:
    fmt = IntegerFormat()
    x, w = torch.full((1, 1, 1500), 126.0), torch.full((1, 1, 1500), 127.0)
    x[0, 0, 0], axes = 125.0, Axes(output=0, input=1, feature=-2)
    assert num_exact_parts(Codes.of(x, fmt), Codes.of(w, fmt), axes) == 0
    result = exact_sum(x, w, fmt, fmt, nn.functional.conv1d, axes).values
    assert result.item() == torch.tensor(126 * 127 * 1500 - 127.0, dtype=torch.float64).float()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [3, 40])
def test_a_traced_sum_is_split_for_the_largest_codes(
    monkeypatch: pytest.MonkeyPatch, bits: int, size: int
) -> None:
    """At 40 x 40 cells one channel alone could pass 2^24."""
    fmt = IntegerFormat(bits)
    x, w = _codes(fmt, 1, 128, size, size), _codes(fmt, 2, 128, size, size)
    known = exact_sum(x, w, fmt, fmt, nn.functional.conv2d, AXES).values
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    num_parts = num_exact_parts(Codes(x, -128, 127), Codes(w, -128, 127), AXES)
    assert num_parts == {3: 2, 40: 0}[size]  # 128 * 9 * 128^2 is just above 2^24
    assert torch.equal(exact_sum(x, w, fmt, fmt, nn.functional.conv2d, AXES).values, known)


def test_wide_sums_have_the_gradient_of_the_convolution() -> None:
    fmt = IntegerFormat(16)
    x, w = _codes(fmt, 1, 4, 5, 5).requires_grad_(), _codes(fmt, 2, 4, 3, 3).requires_grad_()
    ours = torch.autograd.grad(exact_sum(x, w, fmt, fmt, nn.functional.conv2d, AXES).values.sum(), (x, w))
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
