"""The formula equals pytorch-quantization 2.1.3, values and gradients, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization.tensor_quant import fake_tensor_quant

from cpq_train.quantization.numerics.fake_quant import (
    codes,
    fake_quantize,
    scale_of,
    step_of,
)
from cpq_train.quantization.numerics.formats import IntegerFormat

formats = st.builds(IntegerFormat, st.integers(2, 16), st.booleans(), st.booleans())


def _theirs(x: torch.Tensor, amax: torch.Tensor, fmt: IntegerFormat) -> torch.Tensor:
    return fake_tensor_quant(x, amax, fmt.bits, not fmt.signed, fmt.narrow_range)


def _inputs(seed: int, amax: float, fmt: IntegerFormat) -> torch.Tensor:
    """Random values, exact ties between two codes, the edges of the range, and infinities."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(200, generator=generator) * amax
    ties = (torch.arange(-20, 20) + 0.5) * (amax / fmt.qmax)
    edges = torch.tensor([0.0, amax, -amax, 2 * amax, -2 * amax, torch.inf, -torch.inf])
    edges = torch.cat([edges, torch.nextafter(edges[1:3], edges.new_tensor([torch.inf, -torch.inf]))])
    x = torch.cat([random, ties, edges])
    return x if fmt.signed else x.clamp(min=0)


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=150)
@given(formats, st.integers(0, 2**31), st.floats(2.0**-20, 2.0**20, width=32))
def test_per_tensor_equals_pytorch_quantization(fmt: IntegerFormat, seed: int, amax: float) -> None:
    ours = _inputs(seed, amax, fmt).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    amax_tensor = torch.tensor(amax)
    for window in (None, amax):
        ours.grad = theirs.grad = None
        a, b = fake_quantize(ours, amax_tensor, fmt, window), _theirs(theirs, amax_tensor, fmt)
        assert_equal(a, b)
        a.backward(grad)
        b.backward(grad)
        assert_equal(ours.grad, theirs.grad)


@settings(deadline=None, max_examples=80)
@given(formats, st.integers(0, 2**31), st.integers(0, 3))
def test_per_channel_equals_pytorch_quantization(fmt: IntegerFormat, seed: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, 5, 2, generator=generator)
    weight = weight if fmt.signed else weight.abs()
    weight.select(axis, 0).zero_()  # a channel whose amax is 0
    dims = [d for d in range(4) if d != axis]
    amax = weight.abs().amax(dims, keepdim=True) * torch.rand(1, generator=generator)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    a, b = fake_quantize(ours, amax, fmt), _theirs(theirs, amax, fmt)
    assert_equal(a, b)
    grad = torch.randn(weight.shape, generator=generator)
    a.backward(grad)
    b.backward(grad)
    assert_equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("amax", [0.0, 2.0**-24, 2.0**-25])
def test_tiny_amax_gives_zero(amax: float) -> None:
    x = torch.tensor([-1.0, 0.0, 3.0])
    assert_equal(fake_quantize(x, torch.tensor(amax), IntegerFormat()), torch.zeros(3))
    assert_equal(_theirs(x, torch.tensor(amax), IntegerFormat()), torch.zeros(3))


def test_negative_input_to_unsigned_saturates() -> None:
    fmt = IntegerFormat(8, signed=False)
    assert fake_quantize(torch.tensor([-5.0]), torch.tensor(1.0), fmt).item() == 0.0


def test_formats() -> None:
    assert (IntegerFormat().qmin, IntegerFormat().qmax) == (-128, 127)
    assert (IntegerFormat(narrow_range=True).qmin, IntegerFormat(4, signed=False).qmax) == (-127, 15)
    assert IntegerFormat(8, signed=False).qmin == 0


def test_codes_are_whole_numbers_in_range() -> None:
    x = torch.randn(1000) * 3
    result = codes(x, torch.tensor(2.0), IntegerFormat(4))
    assert_equal(result, result.round())
    assert result.min() == -8
    assert result.max() == 7


def test_scale_and_step_of_zero_amax() -> None:
    amax = torch.tensor([0.0, 127.0])
    assert_equal(scale_of(amax, IntegerFormat()), torch.tensor([0.0, 1.0]))
    assert_equal(step_of(amax, IntegerFormat()), torch.tensor([1.0, 1.0]))
