"""One pass over a tensor gives the bits of the several that PyTorch would take."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpq_train.common.kernels import IS_FIT
from cpq_train.quantization.numerics import one_pass
from cpq_train.quantization.numerics.coded import codes_of
from cpq_train.quantization.numerics.fake_quant import (
    add_codes,
    pass_inside,
    round_to_codes,
    scale_of,
    step_of,
)
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.numerics.masks import INSIDE, POSITIVE
from cpq_train.quantization.numerics.one_pass import Scalars

pytestmark = pytest.mark.skipif(not IS_FIT, reason="no Numba, or a processor without fused multiply-add")

FORMATS = [IntegerFormat(bits, signed) for bits in (2, 4, 8) for signed in (True, False)]
BYTES = IntegerFormat(8)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.view(2, 8, -1, 4).contiguous(memory_format=torch.channels_last),
    "channels last, 3-d": lambda t: t.view(2, 8, -1, 2, 2).contiguous(memory_format=torch.channels_last_3d),
    "transposed": lambda t: t.view(16, -1).T,
    "one element": lambda t: t[:1],
    "one element of five axes": lambda t: t[:1].view(1, 1, 1, 1, 1),
    "no axis": lambda t: t[0],
}


def _adversarial(amax: float, fmt: IntegerFormat) -> Tensor:
    """Ties between codes, the ends of the range and their neighbours, zeros, denormals, huge numbers."""
    scale = scale_of(torch.tensor(amax), fmt)
    ties = (torch.arange(-fmt.qmax - 3, fmt.qmax + 4) + 0.5) / scale
    ends = torch.tensor([amax, 0.0, 1e-45, 1e-38, 3e38, math.inf])
    near = [ties, ends]
    for to in (math.inf, -math.inf):
        near += [torch.nextafter(t, torch.tensor(to)) for t in (ties, ends)]
    random = torch.randn(256, generator=torch.Generator().manual_seed(0)) * amax
    values = torch.cat([*near, -torch.cat(near), random]).float()
    return torch.cat([values, values.new_full((-len(values) % 64,), -0.0)])


def _scalars(amax: float, fmt: IntegerFormat) -> Scalars:
    value = torch.tensor(amax)
    return Scalars(scale_of(value, fmt), step_of(value, fmt), value, fmt)


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    """The same bits, strides and all."""
    return (
        found.dtype == wanted.dtype
        and found.stride() == wanted.stride()
        and torch.equal(torch.signbit(found), torch.signbit(wanted))
        and torch.equal(found, wanted)
    )


AMAX = [0.7, 1.0, 127.0, 3e-5, 2.0**-24, 1e30]


@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_of_what_has_no_negative_ones(fmt: IntegerFormat, amax: float) -> None:
    scale = scale_of(torch.tensor(amax), fmt)
    x = _adversarial(amax, fmt).abs()
    x = x[x.isfinite()] if amax == 2.0**-24 else x  # infinity times a scale of 0 is no number
    x[::5] = -0.0
    codes = one_pass.encoded(x, scale, fmt)
    assert codes is not None
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.float(), round_to_codes(x, scale, fmt))
    slightly_below = -0.4 / scale if amax > 2.0**-24 else torch.tensor(-1.0)
    assert one_pass.encoded(slightly_below, scale, fmt).item() == 0


@pytest.mark.parametrize("unfit", [-1.0, -0.006, math.nan, -math.inf])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_one_negative_code_or_nan_leaves_all_to_pytorch(
    place: int, unfit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.linspace(0, 2, 100_000)
    x[place] = unfit
    scale = scale_of(torch.tensor(1.0), BYTES)
    assert one_pass.encoded(x, scale, BYTES) is None
    assert torch.equal(codes_of(x, scale, BYTES), round_to_codes(x, scale, BYTES)) or math.isnan(unfit)
    assert torch.equal(codes_of(x, scale, BYTES).isnan(), x.isnan())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert one_pass.encoded(x, scale, BYTES) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("fmt", [BYTES, FORMATS[0], IntegerFormat(8, signed=False)], ids=str)
def test_relu_with_its_codes_and_gradients(fmt: IntegerFormat, amax: float, layout: str) -> None:
    x = _adversarial(amax, fmt)
    x = x[x.isfinite()] if amax == 2.0**-24 else x
    x = LAYOUTS[layout](x[: len(x) // 64 * 64])
    assert one_pass.is_fit(x)
    made = one_pass.rectified(x, _scalars(amax, fmt), has_mask=True)
    assert made is not None
    relu = torch.relu(x)
    assert _is_same(made.values, relu)
    codes = round_to_codes(relu, scale_of(torch.tensor(amax), fmt), fmt)
    assert made.codes.stride() == codes.stride()
    assert torch.equal(made.codes.float(), codes)
    for grad in (torch.randn_like(x), torch.randn(x.shape), torch.tensor(-2.0).expand_as(x)):
        behind = torch.ops.aten.threshold_backward(grad, relu, 0)
        inside = torch.ops.aten.threshold_backward(pass_inside(grad, relu, float(np.float32(amax))), relu, 0)
        assert torch.equal(one_pass.passed(grad, made.mask, POSITIVE), behind)
        assert torch.equal(one_pass.passed(grad, made.mask, POSITIVE | INSIDE), inside)
    without = one_pass.rectified(x, _scalars(amax, fmt), has_mask=False)
    assert without.mask is None
    assert torch.equal(without.codes, made.codes)


@pytest.mark.parametrize("has_gradient", [True, False])
def test_relu_of_a_nan_is_left_to_pytorch(has_gradient: bool) -> None:
    x = torch.tensor([1.0, math.nan, -1.0])
    assert one_pass.rectified(x, _scalars(1.0, BYTES), has_gradient) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("fmt", [BYTES, IntegerFormat(4, signed=False), IntegerFormat(16)], ids=str)
def test_sums_of_rounded_numbers(fmt: IntegerFormat, dtype: torch.dtype, amax: float, layout: str) -> None:
    a = _adversarial(amax, BYTES)
    a = a[a.isfinite()] if amax == 2.0**-24 else a
    a = LAYOUTS[layout](a[: len(a) // 64 * 64])
    codes_b = torch.randint_like(a, 0 if dtype == torch.uint8 else -128, 128).to(dtype)
    step_b = torch.tensor(0.0123)
    scalars = _scalars(amax, fmt)
    y, mask = one_pass.added(a, scalars, codes_b, step_b, has_gradient=True)
    value = torch.tensor(amax)
    codes_a = round_to_codes(a, scale_of(value, fmt), fmt)
    assert _is_same(y, add_codes(codes_a, step_of(value, fmt), codes_b.float(), step_b))
    grad = torch.randn(a.shape)
    assert torch.equal(one_pass.passed(grad, mask, INSIDE), pass_inside(grad, a, float(value)))
    plain, none = one_pass.added(a, scalars, codes_b, step_b, has_gradient=False)
    assert none is None
    assert torch.equal(plain, y)


def test_a_nan_stays_one_in_a_sum() -> None:
    a = torch.tensor([1.0, math.nan, -1.0])
    y, _ = one_pass.added(a, _scalars(1.0, BYTES), torch.ones(3).byte(), torch.tensor(1.0), True)
    assert y.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_units", [1, 7])
@pytest.mark.parametrize("feature_axis", [-1, -3])
def test_sums_scaled_by_channel(feature_axis: int, num_units: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (50, 7) if feature_axis == -1 else (2, 7, 5, 6)
    sums = torch.randint(-(2**24), 2**24, shape, generator=generator).float()
    layouts = [sums]
    if feature_axis == -3:
        layouts += [sums.contiguous(memory_format=torch.channels_last), sums[..., ::2], sums[:0]]
    unit = torch.rand(num_units, generator=generator) * 1e-3
    bias = torch.randn(7, generator=generator) if has_bias else None
    by_channel = [-1 if d == len(shape) + feature_axis else 1 for d in range(len(shape))]
    for given_sums in layouts:
        expected = given_sums * unit.view(by_channel if num_units > 1 else [])
        expected = expected if bias is None else expected + bias.view(by_channel)
        mine = given_sums.clone(memory_format=torch.preserve_format)
        found = one_pass.scale_(mine, unit.view(()) if num_units == 1 else unit, bias, feature_axis)
        assert found.data_ptr() == mine.data_ptr()
        assert torch.equal(found, expected)


@given(
    sums=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60),
    bias=st.none() | st.integers(-(2**31), 2**31),
)
@example(sums=[2**24 + 1], bias=1)
@settings(max_examples=100, deadline=None)
def test_sums_and_bias_codes_are_rounded_once(sums: list[int], bias: int | None) -> None:
    given_sums = torch.tensor([sums, sums[::-1]]).int()
    codes = None if bias is None else torch.full((len(sums),), bias).float()
    total = given_sums.numpy().astype(np.int64) + (0 if codes is None else codes.long().numpy())
    assert torch.equal(one_pass.rounded(given_sums, codes), torch.from_numpy(total.astype(np.float32)))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_no_bit_depends_on_the_number_of_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 40_003, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    scalars = _scalars(1.0, BYTES)

    def results() -> list[Tensor]:
        made = one_pass.rectified(x, scalars, has_mask=True)
        codes = one_pass.encoded(x.abs(), torch.tensor(100.0), BYTES)
        y, mask = one_pass.added(x, scalars, codes, torch.tensor(0.1), has_gradient=True)
        sums = (x * 1e6).contiguous()
        scaled = one_pass.scale_(sums.clone(), torch.rand(5, generator=torch.Generator()), None, -1)
        rounded = one_pass.rounded(sums.int().view(-1, 5), torch.arange(5.0))
        return [*made, codes, y, mask, one_pass.passed(x, made.mask, POSITIVE), scaled, rounded]

    expected = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert all(map(torch.equal, results(), expected))


def test_what_is_not_fit() -> None:
    x = torch.randn(4, 6, 8)
    for fit in (x, x.transpose(0, 2), x[1:], x.permute(2, 0, 1), x[:, :1, :1].contiguous(), x[0, 0, 0]):
        assert one_pass.is_fit(fit)
    gaps = (x[..., ::2], x[:, :3], x[:1].expand(4, 6, 8), x.as_strided((3, 3), (1, 1)))
    other = (x.double(), x.half(), x.int(), torch.empty(0, 3), x.to("meta"), x.to_sparse())
    for unfit in (*gaps, *other):
        assert not one_pass.is_fit(unfit)
    assert not one_pass.is_fit(x, x.transpose(0, 2))
    assert not one_pass.is_fit(x, x[0])
    assert not one_pass.is_fit(x, x.contiguous().permute(0, 2, 1).contiguous().permute(0, 2, 1))
