"""What a pickle would make, looked at before it is read: torch admits more than memory and stack can bear."""

from __future__ import annotations

import pickletools
from typing import BinaryIO, Final, NamedTuple

from cpq_train.common.errors import UserError

MAX_TUPLE_DEPTH: Final = 64
MAX_TUPLE_SIZE: Final = 1_000_000
"""Of tuples within tuples, whose hash as a key takes as many calls, one within the other."""

_BYTES: Final = ("builtins bytearray", "__builtin__ bytearray")
"""What takes as much memory as it is told; torch admits it."""


class _Made(NamedTuple):
    """A value on the stack: how deep tuples are nested in it, and how many values they stand for."""

    depth: int = 0
    size: int = 1


_PLAIN: Final = _Made()
_MARK: Final = _Made(-1, 0)
_ITEMS: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check_pickle(file: BinaryIO, where: str) -> None:
    """Follow a pickle to its end, without making anything.

    Args:
        file: At its start; is left behind its end.
        where: What to call it in the message.

    Raises:
        UserError: It makes bytes, or tuples that stand for too much.
        Exception: It is no pickle; of garbage, anything may be raised.
    """
    stack: list[_Made] = []
    memo: dict[object, _Made] = {}
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL" and argument in _BYTES:
            raise UserError(f"{where} makes bytes as it is read; accepted: tensors and plain values")
        if code.name == "MARK":
            stack.append(_MARK)
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "TUPLE":
            stack.append(_tuple(_to_mark(stack), where))
        elif code.name in _ITEMS:
            stack.append(_tuple([stack.pop() for _ in range(_ITEMS[code.name])], where))
        else:
            _apply(code, stack)


def _tuple(items: list[_Made], where: str) -> _Made:
    made = _Made(1 + max((one.depth for one in items), default=0), 1 + sum(one.size for one in items))
    if made.depth > MAX_TUPLE_DEPTH or made.size > MAX_TUPLE_SIZE:
        raise UserError(
            f"{where} holds a tuple of {made.size:,} values, {made.depth} deep; accepted: up to "
            f"{MAX_TUPLE_SIZE:,}, and {MAX_TUPLE_DEPTH}"
        )
    return made


def _to_mark(stack: list[_Made]) -> list[_Made]:
    items = []
    while (top := stack.pop()) is not _MARK:
        items.append(top)
    return items


def _apply(code: pickletools.OpcodeInfo, stack: list[_Made]) -> None:
    """Take from the stack what an operation takes, and put what it makes, which no tuple is."""
    takes = code.stack_before
    if pickletools.markobject in takes:
        _to_mark(stack)
        takes = takes[: takes.index(pickletools.markobject)]
    for _ in takes:
        stack.pop()
    stack.extend([_PLAIN] * len(code.stack_after))
