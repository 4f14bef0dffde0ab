"""Schema numbers of the files that are written here; `docs/formats.md` is the policy.

A number goes up where an older reader would misread the file, not where something is only added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

from cpq_train.common.errors import UserError


def check_schema(found: Any, newest: int, what: str) -> None:
    """Refuse a file that this release cannot read.

    Args:
        found: Its schema number, None where it says none.
        newest: The one that is written here; all from 1 to it are read.
        what: The file, for the message.

    Raises:
        UserError: The number is none of those.
    """
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= newest:
        is_newer = isinstance(found, int) and found > newest
        why = ": a newer cpq_train wrote it, read it with that one" if is_newer else ""
        accepted = "1" if newest == 1 else f"1 to {newest}"
        raise UserError(f"{what}: schema is {found!r}; accepted: {accepted}{why}")


Check: TypeAlias = tuple[Callable[[Any], bool], str]
"""Whether a value is accepted, and what is."""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


NUMBER: Check = (is_number, "a finite number")
TEXT: Check = (lambda value: isinstance(value, str), "a text")
MAPPING: Check = (lambda value: isinstance(value, dict), "a mapping")


def check_document(document: Any, newest: int, accepted: dict[str, Any], where: str) -> None:
    """Check the contents of a JSON file; keys that are not accepted are passed over.

    Args:
        document: The contents.
        newest: The schema that is written here.
        accepted: Key -> a check, or a mapping of the same form for what lies below; a list of one of these
            accepts a list whose members are all so.
        where: What to call the file in the message.

    Raises:
        UserError: Its schema is another one, a key is missing or its value is not of the kind accepted; the
            message names both.
    """
    if isinstance(document, dict):
        check_schema(document.get("schema"), newest, where)
    _check(document, accepted, where)


def _check(value: Any, accepted: Any, where: str) -> None:
    if isinstance(accepted, dict):
        if not isinstance(value, dict) or not accepted.keys() <= value.keys():
            have = sorted(value) if isinstance(value, dict) else repr(value)
            raise UserError(f"{where}: keys {have}; accepted: all of {list(accepted)}")
        for key, check in accepted.items():
            _check(value[key], check, f"{where}: {key}" if ": " not in where else f"{where}.{key}")
        return
    if isinstance(accepted, list):
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; accepted: a list")
        for number, one in enumerate(value):
            _check(one, accepted[0], f"{where}[{number}]")
        return
    is_good, description = accepted
    if not is_good(value):
        raise UserError(f"{where} is {value!r}; accepted: {description}")
