"""What can be wrong with an amax, and the table that says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from cpq_train.common.errors import UserError

WEIGHT_QUANTIZER = "_weight_quantizer"
"""Last part of the names of the quantizers of weights."""


class Problem(NamedTuple):
    """One thing wrong with one quantizer's amax.

    Attributes:
        quantizer: Its name in the state dict.
        layer: Kind of its layer, empty where it is not known.
        problem: What is wrong.
        affected: In how many of how many values.
    """

    quantizer: str
    layer: str
    problem: str
    affected: str


def table(problems: Sequence[Problem]) -> str:
    """The problems as lines of aligned plain text, under a header."""
    rows = [("quantizer", "layer", "problem", "affected"), *problems]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def refuse(problems: Sequence[Problem], where: str = "") -> None:
    """End with the table of problems, if there are any.

    Args:
        problems: What was found.
        where: What the sentence starts with, such as a checkpoint's name and a colon.

    Raises:
        UserError: There is a problem.
    """
    if problems:
        num = len({p.quantizer for p in problems})
        raise UserError(f"{where}{num} quantizers have no usable amax:\n{table(problems)}")


def value_problems(name: str, layer: str, amax: Tensor) -> list[Problem]:
    """NaN, infinite, negative and zero values of an amax.

    Zero is fine for a channel of a per-channel weight: its weights are all zero, and quantize to zero.
    """
    checks = {
        "NaN: never calibrated, or lost": amax.isnan(),
        "infinite": amax.isinf(),
        "negative": amax < 0,
    }
    if not (is_weight(name) and amax.dim()):
        checks["zero"] = amax == 0
    return [
        Problem(name, layer, text, f"{int(bad.sum())} of {bad.numel()}")
        for text, bad in checks.items()
        if bad.any()
    ]


def state_problems(name: str, layer: str, amax: Tensor | None, expected: Tensor) -> list[Problem]:
    """What is wrong with an amax that is about to be loaded in the place of one of the expected shape."""
    size = f"{expected.numel()} of {expected.numel()}"
    if amax is None:
        return [Problem(name, layer, "missing", size)]
    if amax.shape != expected.shape:
        return [Problem(name, layer, _shape_problem(amax, expected), size)]
    return value_problems(name, layer, amax)


def _shape_problem(amax: Tensor, expected: Tensor) -> str:
    shapes = f"{tuple(amax.shape)} instead of {tuple(expected.shape)}"
    axis, expected_axis = _axis(amax), _axis(expected)
    if axis == expected_axis:
        return f"wrong shape: {shapes}"
    return f"wrong axis: {_granularity(axis)} instead of {_granularity(expected_axis)}, {shapes}"


def _axis(amax: Tensor) -> int | None:
    return next((axis for axis, length in enumerate(amax.shape) if length > 1), None)


def _granularity(axis: int | None) -> str:
    return "per tensor" if axis is None else f"per channel of axis {axis}"


def is_weight(name: str) -> bool:
    """Whether a quantizer is that of a weight."""
    return name.endswith(WEIGHT_QUANTIZER)
