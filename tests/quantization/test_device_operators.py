"""The operators of a GPU: what they compute, and that Triton's kernels compute the same.

Without a GPU the kernels run in Triton's interpreter, in a process of its own, and are compiled for GPUs that
are not there, which shows what becomes of products and sums that follow each other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from cpq_train.quantization.numerics import fake_quant
from cpq_train.quantization.numerics.device import eager
from cpq_train.quantization.numerics.device.operators import SCHEMAS, operators
from cpq_train.quantization.numerics.formats import IntegerFormat

KERNELS = "cpq_train.quantization.numerics.device.triton_kernels"
SIZES = [0, 1, 1023, 1024, 1025, 5000]
FORMATS = [
    *(IntegerFormat(bits, signed) for bits in (2, 3, 8, 9, 16) for signed in (True, False)),
    IntegerFormat(8, narrow_range=True),
    IntegerFormat(2, narrow_range=True),
]
LAYOUTS = {  # of (2, 5, 4, 3) maps and (7, 5) features, and where they have their channels
    "channels_last": (-3, lambda: torch.empty(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)),
    "NCHW": (-3, lambda: torch.empty(2, 5, 4, 3)),
    "features": (-1, lambda: torch.empty(7, 5)),
    "axis 1": (1, lambda: torch.empty(2, 5, 4, 3)),
    "one pixel": (-3, lambda: torch.empty(9, 5, 1, 1)),
    "one channel": (-3, lambda: torch.empty(2, 1, 40, 30)),
}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

Call = Callable[..., Any]


def _interpret(name: str, arguments: tuple[Any, ...]) -> Any:
    """In the other process: what a kernel returns, or wrote into its first argument."""
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    torch.set_num_threads(1)
    found = getattr(import_module(KERNELS), name)(*arguments)
    return arguments[0] if found is None else found


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Call]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield lambda name, arguments: process.submit(_interpret, name, arguments).result()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernels(request: pytest.FixtureRequest) -> Call:
    """Calls a kernel by the name of its operator with tensors of the CPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "interpreter":
        interpret = request.getfixturevalue("interpreter")
        return lambda name, *arguments: interpret(name, arguments)

    def call(name: str, *arguments: Any) -> Any:
        there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        found = getattr(operators, name)(*there)
        found = there[0] if found is None else found
        return found.cpu() if isinstance(found, Tensor) else tuple(one.cpu() for one in found)

    return call


def _numbers(length: int, seed: int = 0) -> Tensor:
    """Around codes of step 1/4: some on a tie, some no number, some beyond every range."""
    x = 4 * torch.randn(length, generator=torch.Generator().manual_seed(seed))
    ties = (torch.arange(length) % 41 - 20 + 0.5) / 4
    x = torch.where(torch.arange(length) % 3 == 0, ties, x)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-38, 7.75, -8.0]
    num_special = min(len(special), length // 2)
    x[:num_special] = torch.tensor(special[:num_special])
    return x


def _range(fmt: IntegerFormat, amax: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, step and amax; unless told otherwise the step is 1/4."""
    found = torch.tensor(fmt.qmax / 4 if amax is None else amax)
    return fake_quant.scale_of(found, fmt), fake_quant.step_of(found, fmt), found


def _bounds(fmt: IntegerFormat) -> tuple[float, float]:
    return float(fmt.qmin), float(fmt.qmax)


def _same(found: Any, expected: Any) -> None:
    """Number by number; NaN is like NaN, and 0 like -0."""
    if isinstance(expected, Tensor):
        found, expected = [found], [expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# What they compute


def test_every_operator_has_its_kernel_and_its_oracle() -> None:
    for name in SCHEMAS:
        assert callable(getattr(eager, name))
        assert callable(getattr(operators, name))


@needs_triton
def test_every_operator_has_a_kernel() -> None:
    kernels = import_module(KERNELS)
    assert all(callable(getattr(kernels, name)) for name in SCHEMAS)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [None, 0.0, 2.0**-24, 2.5])
def test_codes_are_those_of_the_formula(fmt: IntegerFormat, amax: float | None) -> None:
    x, (scale, _, _) = _numbers(3000), _range(fmt, amax)
    expected = (x * scale).round().clamp(fmt.qmin, fmt.qmax)
    _same(operators.encode(x, scale, *_bounds(fmt)), expected)
    _same(fake_quant.round_to_codes(x, scale, fmt), expected)


def test_a_mask_says_which_gradients_a_relu_and_a_range_let_through() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 0.5, 2.0, 2.1, torch.inf, torch.nan])
    scale, _, amax = _range(IntegerFormat(8, signed=False), 2.0)
    values, codes, mask = operators.rectify(x, scale, amax, 255.0, True)
    grad = torch.arange(1.0, 9.0)
    assert values[:7].tolist() == [0, 0, 0, 0.5, 2.0, pytest.approx(2.1), torch.inf]
    assert codes[:7].tolist() == [0, 0, 0, 64, 255, 255, 255]
    assert values[7].isnan()
    assert codes[7].isnan()
    assert operators.pass_masked(grad, mask, 1).tolist() == [0, 0, 0, 4, 5, 6, 7, 8]
    assert operators.pass_masked(grad, mask, 2).tolist() == [1, 2, 3, 4, 5, 0, 0, 8]
    assert operators.pass_masked(grad, mask, 3).tolist() == [0, 0, 0, 4, 5, 0, 0, 8]
    assert not len(operators.rectify(x, scale, amax, 255.0, False)[2])


def test_a_gradient_passes_up_to_amax() -> None:
    x = torch.tensor([-2.1, -2.0, -0.0, 2.0, 2.1, torch.inf, torch.nan])
    found = operators.pass_inside(torch.arange(1.0, 8.0), x, torch.tensor(2.0))
    assert found.tolist() == [0, 2, 3, 4, 0, 0, 7]


@pytest.mark.parametrize("is_rectified", [False, True])
def test_a_range_is_learned_by_the_formula(is_rectified: bool) -> None:
    fmt = IntegerFormat(4)
    x, grad = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    x = x.relu() if is_rectified else x
    scale, step, amax = _range(fmt, 1.2)
    passed, of_log = operators.learn(grad, x, scale, step, amax, *_bounds(fmt), 7.0, is_rectified)
    inside = x.abs() <= amax
    values = (x * scale).round().clamp(fmt.qmin, fmt.qmax) * step
    expected = (grad * torch.where(inside, values - x, values)).sum() / 7
    torch.testing.assert_close(of_log, expected)
    assert torch.equal(passed, torch.where(inside & (x > 0) if is_rectified else inside, grad, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_scaled_by_channel_in_three_roundings(layout: str) -> None:
    axis, new = LAYOUTS[layout]
    sums = _filled(new())
    channels = sums.shape[axis]
    unit, before, behind = torch.rand(3, channels, generator=torch.Generator().manual_seed(1))
    scaled = sums.clone()
    operators.scale_rows_(scaled, unit, before, behind, axis)
    expected = ((sums.movedim(axis, -1) + before) * unit + behind).movedim(-1, axis)
    assert torch.equal(scaled, expected)


# Triton's kernels


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [None, 0.0])
def test_kernel_encode(kernels: Call, fmt: IntegerFormat, amax: float | None) -> None:
    arguments = _numbers(2000), _range(fmt, amax)[0], *_bounds(fmt)
    _same(kernels("encode", *arguments), eager.encode(*arguments))


@pytest.mark.parametrize("length", SIZES)
def test_kernels_of_every_length(kernels: Call, length: int) -> None:
    fmt = IntegerFormat(8)
    x, grad, codes = (
        _numbers(length),
        _numbers(length, 1),
        _numbers(length, 2).mul(4).round().clamp(-128, 127),
    )
    scale, step, amax = _range(fmt, 3.3)
    bits = _bounds(fmt)
    calls = {
        "encode": (x, scale, *bits),
        "pass_inside": (grad, x, amax),
        "pass_masked": (grad, (4 * x.nan_to_num()).to(torch.uint8) % 4, 2),
    }
    for has_gradient in (False, True):
        calls |= {
            "rectify": (x, scale, amax, 255.0, has_gradient),
            "add_rounded": (x, scale, step, amax, *bits, codes, step, has_gradient),
        }
        for name, arguments in calls.items():
            _same(kernels(name, *arguments), getattr(eager, name)(*arguments))


@pytest.mark.parametrize(
    "fmt", [IntegerFormat(2, signed=False), IntegerFormat(5), IntegerFormat(16)], ids=str
)
def test_kernels_of_a_relu_and_an_add(kernels: Call, fmt: IntegerFormat) -> None:
    a, b = _numbers(1500), _numbers(1500, 1).nan_to_num(0, 5, -5)
    for amax in (None, 0.0, 1.7):
        scale, step, limit = _range(fmt, amax)
        arguments: tuple[Any, ...] = a, scale, limit, float(fmt.qmax), True
        _same(kernels("rectify", *arguments), eager.rectify(*arguments))
        arguments = a, scale, step, limit, *_bounds(fmt), (4 * b).round(), torch.tensor(0.1), True
        _same(kernels("add_rounded", *arguments), eager.add_rounded(*arguments))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_kernel_pass_masked(kernels: Call, bits: int) -> None:
    mask = torch.arange(1500).to(torch.uint8) % 4
    arguments = _numbers(1500), mask, bits
    _same(kernels("pass_masked", *arguments), eager.pass_masked(*arguments))


def test_maps_in_channels_last_memory_stay_there(kernels: Call) -> None:
    x = _filled(torch.empty(2, 5, 4, 3).contiguous(memory_format=torch.channels_last))
    scale, _, amax = _range(IntegerFormat(8, signed=False), 3.0)
    _same(kernels("encode", x, scale, 0.0, 255.0), eager.encode(x, scale, 0.0, 255.0))
    arguments = x, scale, amax, 255.0, True
    _same(kernels("rectify", *arguments), eager.rectify(*arguments))


@pytest.mark.parametrize("length", [1, 1024, 1025, 5000])
@pytest.mark.parametrize("is_rectified", [False, True])
def test_kernel_learn(kernels: Call, length: int, is_rectified: bool) -> None:
    fmt = IntegerFormat(4)
    x, grad = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    x = x.relu() if is_rectified else x
    arguments = grad, x, *_range(fmt, 1.3), *_bounds(fmt), 3.5, is_rectified
    (passed, of_log), (expected, expected_log) = kernels("learn", *arguments), eager.learn(*arguments)
    _same(passed, expected)
    assert of_log.shape == expected_log.shape
    torch.testing.assert_close(of_log, expected_log, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_one", [False, True])
def test_kernel_scale_rows(kernels: Call, layout: str, is_one: bool) -> None:
    axis, new = LAYOUTS[layout]
    sums = _filled(new())
    channels = sums.shape[axis]
    unit, before, behind = 1000 * torch.rand(3, channels, generator=torch.Generator().manual_seed(1))
    unit = unit[:1] if is_one else unit
    for addends in ((None, None), (before, None), (None, behind), (before, behind)):
        expected = sums.clone()
        eager.scale_rows_(expected, unit, *addends, axis)
        _same(kernels("scale_rows_", sums.clone(), unit, *addends, axis), expected)


def test_a_unit_of_one_number_may_have_no_axis(kernels: Call) -> None:
    sums, unit = _filled(torch.empty(7, 5)), torch.tensor(0.3)
    _same(kernels("scale_rows_", sums.clone(), unit, None, None, -1), sums * unit)


ROWS = {"uneven": (1, 1023, 1024, 1025, 3000, 2), "one row": (1500,), "one number": (1,), "even": (27,) * 40}


def _rows(lengths: tuple[int, ...]) -> tuple[dict[str, Any], Tensor]:
    """What operators by row are given, by name, and a gradient."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    formats = [FORMATS[(3 * row) % len(FORMATS)] for row in range(len(lengths))]
    amax = torch.tensor([0.0 if row % 4 == 3 else 1.0 + row % 7 for row in range(len(lengths))])
    qmax = torch.tensor([float(fmt.qmax) for fmt in formats])
    flat = _numbers(sum(lengths)).nan_to_num(0.0, 1e30, -1e30)
    by_name = {
        "flat": flat,
        "starts": starts,
        "longest": max(lengths),
        "scale": fake_quant.scales_of(amax, qmax),
        "step": fake_quant.steps_of(amax, qmax, torch.ones_like(amax)),
        "smallest": torch.tensor([float(fmt.qmin) for fmt in formats]),
        "largest": qmax,
        "amax": amax,
        "factor": 0.1 + torch.arange(len(lengths)) / 7,
    }
    return by_name, torch.randn(len(flat), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("has_values", [False, True])
@pytest.mark.parametrize("has_sums", [False, True])
def test_kernel_round_rows(kernels: Call, rows: str, has_values: bool, has_sums: bool) -> None:
    given, _ = _rows(ROWS[rows])
    names = "flat", "starts", "longest", "scale", "step", "smallest", "largest"
    arguments = *(given[name] for name in names), has_values, has_sums
    codes, values, sums = kernels("round_rows", *arguments)
    _same((codes, values, sums), eager.round_rows(*arguments))
    each = list(codes.split(ROWS[rows]))
    if has_sums:
        whole = [(row.clamp(min=0).double().sum(), row.clamp(max=0).double().sum()) for row in each]
        assert torch.equal(sums.double(), torch.tensor(whole, dtype=torch.float64))
    if has_values:
        products = [row * step for row, step in zip(each, given["step"], strict=True)]
        _same(values, torch.cat(products))


@pytest.mark.parametrize("rows", ROWS)
def test_kernels_of_gradients_by_row(kernels: Call, rows: str) -> None:
    given, grad = _rows(ROWS[rows])
    by_row = grad, *(given[name] for name in ("flat", "starts", "longest", "factor", "amax"))
    _same(kernels("pass_rows", *by_row), eager.pass_rows(*by_row))
    given["flat"] = given["flat"].clamp(-20, 20)  # so that a sum is one
    names = "flat", "starts", "longest", "factor", "amax", "scale", "step", "smallest", "largest"
    arguments = grad, *(given[name] for name in names)
    (passed, sums), (expected, expected_sums) = (
        kernels("learn_rows", *arguments),
        eager.learn_rows(*arguments),
    )
    _same(passed, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-3)


def _filled(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return like.copy_(1000 * torch.randn(like.shape, generator=generator))


# Kernels compiled for a GPU, which need not be there


class _Compiled:
    """Takes the place of a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, found: list[str], **options: bool) -> None:
        self._kernel, self._found, self._options = kernel, found, options

    def __getitem__(self, grid: Any) -> Any:
        return self._compile

    def _compile(self, *arguments: Any, **more: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self._kernel.arg_names
        constants = {name: more.pop(name) for name in list(more) if name in names}
        signature = dict(zip(names, map(_type_of, arguments), strict=False))
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self._kernel, signature, constants)
        options = {**more, **self._options}
        self._found.append(
            triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        )


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return {torch.float32: "*fp32", torch.uint8: "*u8", torch.int64: "*i64"}[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def _compiled(monkeypatch: pytest.MonkeyPatch, **options: bool) -> str:
    """PTX of all launches; options beside those of the launches."""
    kernels, found = import_module(KERNELS), list[str]()
    names = [f"_{name.removesuffix('_')}" for name in SCHEMAS]
    for name in names:
        monkeypatch.setattr(kernels, name, _Compiled(getattr(kernels, name), found, **options))
    x, mask = torch.ones(64), torch.ones(64, dtype=torch.uint8)
    by, bounds = _range(IntegerFormat()), (-128.0, 127.0)
    given, grad = _rows((30, 34))
    row = {name: given[name] for name in given if name not in ("flat", "starts", "longest")}
    flat = given["flat"], given["starts"], given["longest"]
    kernels.encode(x, by[0], *bounds)
    kernels.rectify(x, by[0], by[2], 127.0, True)
    kernels.pass_masked(x, mask, 2)
    kernels.pass_inside(x, x, by[2])
    kernels.learn(x, x, *by, *bounds, 2.0, True)
    kernels.add_rounded(x, *by, *bounds, x, by[1], True)
    kernels.scale_rows_(x.view(8, 8), x[:8], x[:8], x[:8], -1)
    of_range = row["scale"], row["step"], row["smallest"], row["largest"]
    kernels.round_rows(*flat, *of_range, True, True)
    kernels.pass_rows(grad, *flat, row["factor"], row["amax"])
    kernels.learn_rows(grad, *flat, row["factor"], row["amax"], *of_range)
    assert len(found) == len(SCHEMAS)
    return "".join(found)


@needs_triton
def test_no_rounding_is_left_out_between_a_product_and_a_sum(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the instructions of a GPU, which Triton writes without one; the interpreter fuses nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    with monkeypatch.context() as patch:
        launched = _compiled(patch)
    with monkeypatch.context() as patch:
        fused = _compiled(patch, enable_fp_fusion=True)
    assert "mul.f32" in launched or "mul.rn.f32" in launched
    assert "fma." not in launched
    assert ".ftz" not in launched  # nor are small numbers made 0
    assert "fma." in fused  # so that the test sees what it looks for
