"""Ranges from tensors: exact counts, any order, known answers, and NumPy twins of the methods."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpq_train.quantization.collectors import NUM_BINS, HistogramCollector, MaxCollector, new_collector
from cpq_train.quantization.scheme import QuantizerScheme

METHODS = ("max", "percentile", "mse", "entropy")


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


def test_max_is_the_largest_magnitude() -> None:
    assert _amax("max", torch.tensor([1.0, -3.5]), torch.tensor([2.0])) == 3.5


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


def test_entropy_cuts_a_lone_outlier() -> None:
    values = torch.cat([torch.randn(100_000).abs(), torch.full((3,), 100.0)])
    assert 2.0 < _amax("entropy", values) < 20.0


@pytest.mark.parametrize("method", METHODS)
def test_nothing_seen_and_only_zeros(method: str) -> None:
    assert np.isnan(_amax(method))
    zeros = _amax(method, torch.zeros(10))
    assert zeros == 0.0 or np.isnan(zeros)


@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_value_is_not_hidden(method: str) -> None:
    assert not np.isfinite(_amax(method, torch.tensor([1.0, torch.inf]), torch.tensor([2.0])))


def test_counts_beyond_fp32() -> None:
    """2^24 + 1 equal values: an fp32 counter would stop at 2^24."""
    collector = HistogramCollector(QuantizerScheme(method="mse"))
    collector.collect(torch.ones(2**24))
    collector.collect(torch.ones(1))
    assert collector._counts.sum() == 2**24 + 1


def test_max_collector_keeps_no_graph() -> None:
    collector = MaxCollector()
    collector.collect(torch.ones(3, requires_grad=True).detach())
    assert collector.compute_amax() == 1.0
