"""Codes as digits: split, multiplied and put together in onnxruntime, against int64."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from exported_networks import run_nodes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpq_train.export.graph import Graph
from cpq_train.export.portable.digits import (
    BYTE_BITS,
    EXACT_LIMIT,
    Digit,
    bits_of_exact_sums,
    put_together,
    split,
)
from cpq_train.quantization.numerics.formats import IntegerFormat

formats = st.builds(IntegerFormat, st.integers(2, 16), st.booleans(), st.booleans())
FORMATS = [IntegerFormat(bits, signed) for bits in (2, 5, 7, 8, 9, 16) for signed in (True, False)]
FORMATS += [IntegerFormat(bits, narrow_range=True) for bits in (2, 8, 16)]


def _graph() -> Graph:
    graph = Graph()
    graph.input("codes", np.float32, ["N"])
    return graph


def _all_codes(fmt: IntegerFormat) -> NDArray[np.float32]:
    return np.arange(fmt.qmin, fmt.qmax + 1, dtype=np.float32)


def _values(graph: Graph, digits: list[Digit], codes: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    made = [digit.tensor for digit in digits if digit.tensor != "codes"]
    found = dict(zip(made, run_nodes(graph, {"codes": codes}, made), strict=True)) if made else {}
    values = [found.get(digit.tensor, codes) for digit in digits]
    assert all(value.dtype == np.float32 and (value == np.floor(value)).all() for value in values)
    return [value.astype(np.int64) for value in values]


@pytest.mark.parametrize("num_bits", range(1, 18))
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_code_is_the_sum_of_its_digits(fmt: IntegerFormat, num_bits: int) -> None:
    graph, codes = _graph(), _all_codes(fmt)
    digits = split(graph, "codes", fmt.qmin, fmt.qmax, num_bits)
    values = _values(graph, digits, codes)
    assert [digit.place for digit in digits] == [2 ** (num_bits * place) for place in range(len(digits))]
    total = sum(digit.place * value for digit, value in zip(digits, values, strict=True))
    assert np.array_equal(total, codes.astype(np.int64))
    for digit, value in zip(digits, values, strict=True):
        assert value.max() < 2**num_bits
        assert value.min() >= (-(2**num_bits) if digit.is_signed else 0)
    assert [digit.is_signed for digit in digits] == [False] * (len(digits) - 1) + [fmt.signed]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_more_digits_than_needed(fmt: IntegerFormat) -> None:
    for num_bits in range(1, 18):
        magnitude_bits = fmt.bits - int(fmt.signed)
        digits = split(_graph(), "codes", fmt.qmin, fmt.qmax, num_bits)
        assert len(digits) == math.ceil(magnitude_bits / num_bits)


@pytest.mark.parametrize(
    ("smallest", "largest", "num_digits"),
    [
        (0, 7, 1),
        (0, 8, 2),
        (-8, 7, 1),
        (-9, 7, 2),
        (-8, 8, 2),
        (0, 63, 2),
        (0, 64, 3),
        (-64, 0, 2),
        (-65, 0, 3),
    ],
)
def test_limits_of_three_bits(smallest: int, largest: int, num_digits: int) -> None:
    digits = split(_graph(), "codes", smallest, largest, num_bits=3)
    assert [digit.place for digit in digits] == [1, 8, 64][:num_digits]
    assert digits[-1].is_signed == (smallest < 0)


@pytest.mark.parametrize("widths", [*combinations(range(1, 16), 2), (7, 7)], ids=str)
def test_readers_that_split_the_same_codes_differently(widths: tuple[int, int]) -> None:
    """Places of one width are places of another too: 2^8 is the second of width 4 and the first of 8."""
    fmt = IntegerFormat(16)
    graph, codes = _graph(), np.array([fmt.qmin, -4097, -1, 0, 1, 255, 4096, 12345, fmt.qmax], np.float32)
    for num_bits in (*widths, *widths[::-1]):
        digits = split(graph, "codes", fmt.qmin, fmt.qmax, num_bits)
        values = _values(graph, digits, codes)
        total = sum(digit.place * value for digit, value in zip(digits, values, strict=True))
        assert np.array_equal(total, codes)
        assert all(value.max() < 2**num_bits for value in values)


def test_digits_of_bytes_fit_bytes() -> None:
    for fmt in FORMATS:
        for digit in (graph := _graph(), split(graph, "codes", fmt.qmin, fmt.qmax, BYTE_BITS))[1]:
            (value,) = _values(graph, [digit], _all_codes(fmt))
            of = np.iinfo(np.int8 if digit.is_signed else np.uint8)
            assert of.min <= value.min()
            assert value.max() <= min(of.max, 127)


@st.composite
def products(draw: Any) -> tuple[IntegerFormat, NDArray[np.float32], NDArray[np.int8]]:
    """A format, rows of codes (N, C), and codes of a weight (C', C, 1, 1)."""
    fmt, weight = draw(formats), IntegerFormat(draw(st.integers(2, 8)))
    num, channels = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 64, 700]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):  # extremes only
        codes = rng.choice([fmt.qmin, fmt.qmax], (num, channels))
        weights = rng.choice([weight.qmin, weight.qmax], (2, channels, 1, 1))
    else:
        codes = rng.integers(fmt.qmin, fmt.qmax + 1, (num, channels))
        weights = rng.integers(weight.qmin, weight.qmax + 1, (2, channels, 1, 1))
    if draw(st.booleans()):  # products of one sign: the largest sums
        codes, weights = np.abs(codes).clip(max=fmt.qmax), np.abs(weights).clip(max=weight.qmax)
    return fmt, codes.astype(np.float32), weights.astype(np.int8)


@settings(deadline=None, max_examples=150)
@given(products())
def test_sums_put_together_are_those_of_int64(
    case: tuple[IntegerFormat, NDArray[np.float32], NDArray[np.int8]],
) -> None:
    fmt, codes, weights = case
    num_bits = bits_of_exact_sums(weights, 0, fmt.signed)
    graph = Graph()
    graph.input("codes", np.float32, ["N", "C", 1, 1])
    digits = split(graph, "codes", fmt.qmin, fmt.qmax, num_bits)
    values = graph.cast(graph.initializer("w", weights), np.float32, "weight")
    sums = [graph.node("Conv", [d.tensor, values], f"sum{n}") for n, d in enumerate(digits)]
    put_together(graph, sums, [digit.place for digit in digits], "total")
    (total,) = run_nodes(graph, {"codes": codes[:, :, None, None]}, ["total"])
    whole = codes.astype(np.int64) @ weights[:, :, 0, 0].astype(np.int64).T
    assert np.array_equal(total[:, :, 0, 0], whole.astype(np.float32))


def test_several_sums_are_rounded_once() -> None:
    """2^26 + 2 + 1 + 1: rounded part by part it would be 2^26."""
    graph, parts = Graph(), {"a": [3.0, -3.0], "b": [2.0**16 - 1, -(2.0**16)]}
    for name in parts:
        graph.input(name, np.float32, [2])
    put_together(graph, list(parts), [1, 1025], "total")
    (total,) = run_nodes(graph, {k: np.array(v, np.float32) for k, v in parts.items()}, ["total"])
    whole = np.array([3 + 1025 * (2**16 - 1), -3 - 1025 * 2**16])
    assert (np.abs(whole) > EXACT_LIMIT).all()
    assert np.array_equal(total, whole.astype(np.float32))


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([1, 2, 9, 100, 5000]), st.integers(0, 1),
    st.booleans(),
)  # fmt: skip
def test_digits_are_as_wide_as_sums_stay_exact(
    seed: int, bits: int, num_terms: int, axis: int, is_signed: bool
) -> None:
    fmt, rng = IntegerFormat(bits), np.random.default_rng(seed)
    low = rng.integers(fmt.qmin, 1)
    weights = rng.integers(low, fmt.qmax + 1, (3, num_terms)).astype(np.int8)
    num_bits = bits_of_exact_sums(weights if axis == 0 else weights.T, axis, is_signed)
    assert _largest_partial_sum(weights, num_bits, is_signed) <= EXACT_LIMIT
    if weights.any():
        bound = np.maximum(*_by_sign(weights)) if not is_signed else sum(_by_sign(weights))
        assert 2 ** (num_bits + 1) * int(bound.max()) > EXACT_LIMIT


def _by_sign(weights: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    whole = weights.astype(np.int64)
    return np.where(whole > 0, whole, 0).sum(1), np.where(whole < 0, -whole, 0).sum(1)


def _largest_partial_sum(weights: NDArray[Any], num_bits: int, is_signed: bool) -> int:
    """The worst that any order of summation of any digits can meet on its way."""
    positive, negative = _by_sign(weights)
    largest, smallest = 2**num_bits - 1, -(2**num_bits) if is_signed else 0
    up, down = positive * largest - negative * smallest, negative * largest - positive * smallest
    return int(max(up.max(), down.max()))


def test_weights_of_zeros_leave_codes_whole() -> None:
    assert bits_of_exact_sums(np.zeros((2, 5), np.int8), 0, is_signed=True) == 24
    assert len(split(_graph(), "codes", -(2**15), 2**15 - 1, 24)) == 1


def test_limits_of_known_weights() -> None:
    ones = np.ones((1, 2**16), np.int8)
    assert bits_of_exact_sums(ones, 0, is_signed=False) == 8  # 2^16 * 255 fits, 2^16 * 511 does not
    assert bits_of_exact_sums(np.append(ones, [[1]], 1), 0, is_signed=False) == 7
    halves = np.append(ones, -ones, 1)
    assert bits_of_exact_sums(halves, 0, is_signed=False) == 8  # the two signs never add up
    assert bits_of_exact_sums(halves, 0, is_signed=True) == 7
