"""Ranges from tensors: exact counts, any order, known answers, and NumPy twins of the methods."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpq_train.common.kernels import reference_kernels
from cpq_train.quantization.calibrators.collectors import (
    NUM_BINS,
    Collector,
    HistogramCollector,
    new_collector,
)
from cpq_train.quantization.calibrators.counts import counts_of, limits_of
from cpq_train.quantization.scheme import QuantizerScheme

METHODS = ("max", "percentile", "mse", "entropy")
WIDTH = 0.125


def _amax(method: str, *tensors: torch.Tensor, **settings: object) -> float:
    collector = new_collector(QuantizerScheme(method=method, **settings))
    for tensor in tensors:
        collector.collect(tensor)
    return collector.compute_amax()


@pytest.mark.parametrize("method", METHODS)
def test_order_and_splitting_do_not_matter(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30_000, generator=generator).relu() * torch.logspace(-3, 2, 30_000)
    whole = _amax(method, values)
    assert whole == _amax(method, *values.flip(0).split(777))
    assert whole == _amax(method, *values.sort().values.split(5000))
    assert 0 < whole <= float(values.max())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=1, max_size=30))
def test_every_value_is_counted_however_the_range_grows(values: list[float]) -> None:
    collector = HistogramCollector(QuantizerScheme(method="mse"))
    for value in values:
        collector.collect(torch.tensor([value, -value]))
    assert collector._counts.sum() == 2 * len(values)
    assert max(values) <= collector._width * NUM_BINS


def _awkward_tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    map_BCHW = torch.randn(2, 48, 40, 40, generator=generator).relu()
    spread = torch.randn(1000, generator=generator) * torch.logspace(-42, 1, 1000)
    border = torch.arange(1, NUM_BINS) * WIDTH
    return [
        map_BCHW,
        -map_BCHW.contiguous(memory_format=torch.channels_last),
        map_BCHW[:, ::3],
        torch.cat([spread, border, border.nextafter(torch.tensor(0.0)), torch.tensor([0.0, -0.0])]),
        torch.tensor([-0.0, 0.0]),
        torch.tensor(-3.0),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_one_pass_counts_as_several(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for values in _awkward_tensors():
        counts, limits = counts_of(values, WIDTH, NUM_BINS), limits_of(values)
        with reference_kernels():
            assert counts.tolist() == counts_of(values, WIDTH, NUM_BINS).tolist()
            assert torch.equal(limits, limits_of(values))
        assert counts.sum() == values.count_nonzero()


@pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_limits_of_what_is_not_finite(odd: float) -> None:
    for values in (torch.tensor([1.0, odd, -2.0]), torch.tensor([odd]), torch.tensor([odd, torch.inf])):
        with reference_kernels():
            expected = limits_of(values)
        torch.testing.assert_close(limits_of(values), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_the_reference_kernels(method: str) -> None:
    amax = _amax(method, *_awkward_tensors())
    with reference_kernels():
        assert _amax(method, *_awkward_tensors()) == amax


def test_max_is_the_largest_magnitude() -> None:
    assert _amax("max", torch.tensor([1.0, -3.5]), torch.tensor([2.0])) == 3.5


def test_a_power_of_two_is_binned_alike_in_any_order() -> None:
    grids = []
    for values in ([1.0, 4.0, 0.3], [0.3, 1.0, 4.0], [4.0, 0.3, 1.0]):
        collector = HistogramCollector(QuantizerScheme(method="percentile"))
        for value in values:
            collector.collect(torch.tensor([value]))
        grids.append((collector._width, collector._counts.tolist()))
    assert grids[0] == grids[1] == grids[2]
    assert grids[0][0] * NUM_BINS == 8.0  # the next power of two above 4


def test_percentile_of_a_known_distribution() -> None:
    values = torch.arange(1, 10_001) / 10_000
    assert _amax("percentile", values, percentile=90.0) == pytest.approx(0.9, abs=1e-3)
    assert _amax("percentile", values, percentile=100.0) == 1.0


def test_zeros_are_counted_only_if_asked() -> None:
    values = torch.cat([torch.zeros(9000), torch.linspace(0.01, 1, 1000)])
    assert _amax("percentile", values, percentile=95.0) == pytest.approx(0.95, abs=5e-3)
    assert _amax("percentile", values, percentile=95.0, count_zeros=True) == pytest.approx(0.5, abs=5e-3)


def test_mse_finds_the_least_error() -> None:
    """Against the error of the values themselves, over a grid of ranges."""
    values = torch.cat([torch.randn(50_000), torch.tensor([40.0])]).abs()
    amax = _amax("mse", values)

    def error(a: float) -> float:
        step = a / 127
        return float(((values / step).round().clamp(max=127) * step - values).square().sum())

    best = min(np.linspace(0.5, 40, 400), key=error)
    assert error(amax) <= 1.01 * error(float(best))
    assert amax < 40


def test_mse_weighs_the_rounding_of_the_format() -> None:
    """An outlier that 8-bit integers clip costs FP8, whose steps are relative, next to nothing to keep."""
    values = torch.cat(
        [torch.randn(50_000, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0])]
    )
    assert _amax("mse", values) < 35
    assert _amax("mse", values, format="fp8_e4m3") > 38


def test_entropy_cuts_a_lone_outlier() -> None:
    values = torch.cat([torch.randn(100_000).abs(), torch.full((3,), 100.0)])
    assert 2.0 < _amax("entropy", values) < 20.0


@pytest.mark.parametrize(
    ("values", "bits", "expected"),
    [
        ([2.0] * 9, 8, 2.0),  # one filled bin, at the border of a power of two
        ([2.0] * 9, 4, 2.0),
        ([1.0, 2.0], 8, 2.0),
        ([2.0] * 5 + [2.00244140625] * 5, 8, 2.00244140625),  # two bins beside one another
        ([1.0] * 1000 + [2.0], 4, 2.0),
        ([1.0] * 1000 + [2.0] * 1000, 2, 2.0),
        ([1.0] * 1000 + [2.0] * 10 + [3.0] * 10 + [4.0] * 1000, 2, 4.0),  # more values than levels
        ([2.0**-i for i in range(10)] * 50, 4, 1.0),
    ],
)
def test_entropy_of_few_values(values: list[float], bits: int, expected: float) -> None:
    assert _amax("entropy", torch.tensor(values), bits=bits) == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_entropy_clips_few_of_the_values_of_a_heavy_tail(bits: int) -> None:
    """At 2 bits a normalised divergence is least for a range of 0.06, which clips 99.8 % of them."""
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).exp()
    amax = _amax("entropy", values, bits=bits)
    assert float((values > amax).float().mean()) < 0.05
    assert amax < float(values.max()) / 2


NUM_SETTINGS = {
    "bits": st.integers(2, 16),
    "signed": st.booleans(),
    "narrow_range": st.booleans(),
    "count_zeros": st.booleans(),
}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(METHODS),
    st.fixed_dictionaries(NUM_SETTINGS),
    st.lists(
        st.tuples(
            st.one_of(
                st.floats(2.0**-20, 2.0**20, width=32),
                st.integers(-20, 20).map(lambda e: 2.0**e),
                st.integers(1, NUM_BINS).map(lambda n: n / NUM_BINS),
            ),
            st.integers(1, 1000),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2000),
)
def test_ranges_of_few_values_are_within_them(
    method: str, chosen: dict[str, object], counted: list[tuple[float, int]], num_zeros: int
) -> None:
    """Also a range moves with its values by a power of two, and with their number not at all."""
    values = torch.cat([torch.zeros(num_zeros), *(torch.full((n,), value) for value, n in counted)])
    amax = _amax(method, values, percentile=50.0, **chosen)
    few = method == "percentile" and chosen["count_zeros"] and num_zeros * 2 >= len(values)
    assert amax == 0 if few else 0 < amax <= float(values.max())
    assert _amax(method, values * 8, percentile=50.0, **chosen) == 8 * amax
    assert _amax(method, values, values, percentile=50.0, **chosen) == amax


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.fixed_dictionaries(NUM_SETTINGS),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.integers(0, 2**32),
    st.data(),
)
def test_entropy_clips_none_of_values_that_have_a_level_each(
    chosen: dict[str, object], largest: float, seed: int, data: st.DataObject
) -> None:
    levels = min(2 ** (chosen["bits"] - chosen["signed"]), 256)
    taken = data.draw(st.sets(st.integers(1, levels - 1), max_size=40)) if levels > 2 else set()
    values = [largest, *(largest * (level - 0.5) / levels for level in taken)]
    counts = np.random.default_rng(seed).integers(1, 10 ** np.arange(1, 6).repeat(20)[: len(values)])
    tensor = torch.tensor(values).repeat_interleave(torch.from_numpy(counts))
    assert _amax("entropy", tensor, **chosen) == largest


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_and_only_zeros(method: str) -> None:
    assert np.isnan(_amax(method))
    assert _amax(method, torch.zeros(10)) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_value_is_not_hidden(method: str) -> None:
    first, last = torch.tensor([1.0, -2.0]), torch.tensor([3.0])
    assert _amax(method, first, torch.tensor([1.0, -torch.inf]), last) == torch.inf
    assert np.isnan(_amax(method, first, torch.tensor([1.0, torch.nan]), last))
    assert np.isnan(_amax(method, torch.tensor([torch.nan]), torch.tensor([torch.inf])))


def test_counts_beyond_fp32() -> None:
    """2^24 + 3 equal values in one tensor: an fp32 counter would stop at 2^24."""
    collector = HistogramCollector(QuantizerScheme(method="percentile"))
    collector.collect(torch.full((2**24 + 3,), 1e-5))
    collector.collect(torch.ones(5))
    assert collector._counts.sum() == 2**24 + 8
    assert collector._counts[0] == 2**24 + 3
    assert collector.problem() is None


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_ranges_of_counts_beyond_fp32(method: str) -> None:
    """A histogram and the same one with every count times 2^30 mean the same distribution."""
    collector = HistogramCollector(QuantizerScheme(method=method, percentile=99.9))
    collector.collect(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    amax = collector.compute_amax()
    collector._counts *= 2**30
    assert collector.compute_amax() == amax


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_zeros_do_not_change_the_error_of_a_range(method: str) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    with_zeros = torch.cat([values, torch.zeros(100_000)])
    assert _amax(method, with_zeros, count_zeros=True) == _amax(method, values)
    collector = HistogramCollector(QuantizerScheme(method=method, percentile=50.0, count_zeros=True))
    collector.collect(with_zeros)
    assert collector.problem() is None


def test_a_percentile_that_is_zero_is_a_problem() -> None:
    collector = HistogramCollector(QuantizerScheme(method="percentile", percentile=99, count_zeros=True))
    collector.collect(torch.cat([torch.zeros(199), torch.ones(1)]))
    assert collector.compute_amax() == 0
    assert collector.problem() == (
        "zero, as 99 % of the values it saw are: use count_zeros: false",
        "199 of 200",
    )
    collector.collect(torch.ones(2))
    assert collector.compute_amax() == 1.0
    assert collector.problem() is None


@pytest.mark.parametrize("method", METHODS)
def test_negative_values_of_an_unsigned_quantizer(method: str) -> None:
    collector = new_collector(QuantizerScheme(method=method, signed=False))
    for values in ([1.0, -0.5, 2.0], [3.0], [-0.25, 1.0]):
        collector.collect(torch.tensor(values))
    problem, affected = collector.problem()
    assert problem.startswith("negative values down to -0.5;")
    assert "signed: true" in problem
    assert affected == "2 of 6"


@pytest.mark.parametrize(
    ("values", "problem"),
    [([], "it saw no tensor"), ([0.0, 0.0], "zero"), ([1.0, torch.nan], "NaN"), ([-torch.inf], "infinite")],
)
def test_problems_of_a_range(values: list[float], problem: str) -> None:
    collector = Collector(QuantizerScheme())
    collector.collect(torch.tensor(values))
    assert problem in collector.problem()[0]
