"""Whether a file is what its writer makes of the plan that was read from it; what every reader ends with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from cpq_train.common.errors import UserError


def check_form(model: Any, written: Callable[[], Any], where: str) -> None:
    """Whether a file is the writer's, node by node and number by number.

    Args:
        model: The file.
        written: What the writer makes of the plan that was found in it.
        where: What to call the file in messages.

    Raises:
        UserError: It is not; names the first tensor that differs.
    """
    try:
        expected = written()
    except Exception as error:  # whatever numbers that fit no network make of the writer
        raise UserError(f"{where}: its numbers make no network ({first_line(error)})") from error
    for kind in ("node", "initializer", "input", "output"):
        for found, wanted in zip_longest(getattr(model.graph, kind), getattr(expected.graph, kind)):
            if found != wanted:
                one = wanted if found is None else found
                name = one.output[0] if kind == "node" else one.name
                raise UserError(f"{where}: {kind} {name!r} is not what the writer makes of the rest")
    if model != expected:
        raise UserError(f"{where}: has more than nodes and numbers, or another version of the operators")


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0]
