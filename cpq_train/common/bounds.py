"""How much a checkpoint may stand for: a few bytes of pickle can name one object a billion times."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from torch import Tensor

from cpq_train.common.errors import UserError

MAX_VALUES: Final = 2_000_000
"""How many values a checkpoint may hold; one of a full network and its optimizer has some 20,000."""

MAX_DEPTH: Final = 64
"""How deep they may be nested; Lightning's loops go to 10."""


def check_bounds(content: Any, num_bytes: int, where: str) -> None:
    """Count the values of a checkpoint, each as often as it is met.

    Args:
        content: Of the file.
        num_bytes: Size of the file, which holds all numbers of a tensor.
        where: What to call it in the message.

    Raises:
        UserError: They are too many, nested too deep, or among them is a tensor larger than the file.
    """
    level, num_values = [content], 1
    for _ in range(MAX_DEPTH):
        inside = [_inside(value) for value in level]
        num_values += sum(map(len, inside))
        if num_values > MAX_VALUES:
            raise UserError(f"{where} holds more than {MAX_VALUES:,} values; accepted: fewer")
        for value in level:
            if isinstance(value, Tensor) and value.numel() * value.element_size() > num_bytes:
                shape = tuple(value.shape)
                raise UserError(f"{where}: a tensor of shape {shape} does not fit into {num_bytes:,} bytes")
        level = [value for values in inside for value in values]
        if not level:
            return
    raise UserError(f"{where} is nested deeper than {MAX_DEPTH} levels; accepted: fewer")


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple | set) else ()
