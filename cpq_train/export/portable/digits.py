"""Codes split into digits, so that a kernel's sums of products stay exact.

code = sum of digit * place, places being powers of two. A convolution is linear, so the sums of digits,
whole numbers each, are put together in int64 and rounded to fp32 once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpq_train.export.graph import Graph

EXACT_LIMIT = 2**24
"""fp32 holds every whole number up to here."""

BYTE_BITS = 7
"""Of a digit that enters an 8-bit kernel: CPUs without VNNI add two products of u8 and s8 in 16 bits."""


class Digit(NamedTuple):
    """A digit of codes.

    Attributes:
        place: The value of 1 in it.
        tensor: Whole numbers in fp32.
        is_signed: Whether it may be negative.
    """

    place: int
    tensor: str
    is_signed: bool


def split(graph: Graph, codes: str, smallest: int, largest: int, num_bits: int) -> list[Digit]:
    """Split codes into digits of a width, the lowest first; one digit where they fit.

    Args:
        graph: Where to.
        codes: Tensor of whole numbers in fp32.
        smallest: Least code.
        largest: Largest code.
        num_bits: Digits are below 2^num_bits; the highest one may be negative, down to -2^num_bits.
    """
    assert num_bits >= 1, f"digits of {num_bits} bits"
    base, place, rest, found = 2**num_bits, 1, codes, list[Digit]()
    while largest >= base or smallest < -base:
        high = f"{codes}.base{base}.over{place * base}"  # 2^8 is a place of base 2^4 too, with other rests
        if high not in graph:
            shifted = graph.node("Mul", [rest, graph.number(1 / base)], f"{high}.shifted")
            graph.node("Floor", [shifted], high)
            back = graph.node("Mul", [high, graph.number(base)], f"{high}.back")
            graph.node("Sub", [rest, back], f"{high}.rest")
        found.append(Digit(place, f"{high}.rest", is_signed=False))
        rest, place, smallest, largest = high, place * base, smallest // base, largest // base
    return [*found, Digit(place, rest, is_signed=smallest < 0)]


def bits_of_exact_sums(weight_codes: NDArray[Any], output_axis: int, is_signed: bool) -> int:
    """How wide a digit may be, so that fp32 sums of its products with a weight are exact in any order.

    Without negative digits positive and negative products never add up.

    Args:
        weight_codes: Codes of the weight.
        output_axis: Of its output channels.
        is_signed: Whether a digit may be negative.
    """
    by_channel = np.moveaxis(weight_codes.astype(np.int64), output_axis, 0).reshape(
        weight_codes.shape[output_axis], -1
    )
    positive, negative = by_channel.clip(min=0).sum(1), -by_channel.clip(max=0).sum(1)
    largest = (positive + negative if is_signed else np.maximum(positive, negative)).max(initial=1)
    return int(EXACT_LIMIT // max(int(largest), 1)).bit_length() - 1


def put_together(graph: Graph, sums: Sequence[str], places: Sequence[int], name: str) -> str:
    """The sum of products of the codes, from those of their digits, in fp32.

    Args:
        graph: Where to.
        sums: Tensors of whole numbers, one for each of several digits.
        places: Of the digits.
        name: Of the result.
    """
    total = ""
    for number, (part, place) in enumerate(zip(sums, places, strict=True)):
        whole = graph.cast(part, np.int64, f"{name}.whole{number}")
        scaled = graph.node("Mul", [whole, graph.integer(place)], f"{name}.part{number}")
        total = graph.node("Add", [total, scaled], f"{name}.total{number}") if total else scaled
    return graph.cast(total, np.float32, name)
