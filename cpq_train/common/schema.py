"""What files should hold: schema numbers (`docs/formats.md` is the policy), and types through pydantic.

A number goes up where an older reader would misread the file, not where something is only added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import GenericAlias
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from cpq_train.common.errors import UserError, shown

T = TypeVar("T")


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
        raise UserError(f"{what}: schema is {shown(found)}; accepted: {accepted}{why}")


def check_document(document: Any, newest: int, kind: TypeAdapter[Any], where: str) -> None:
    """Check the contents of a JSON file; keys that `kind` does not have are passed over.

    Args:
        document: The contents.
        newest: The schema that is written here.
        kind: What they should be.
        where: What to call the file in the message.

    Raises:
        UserError: See `check_schema` and `validated`.
    """
    if isinstance(document, dict):
        check_schema(document.get("schema"), newest, where)
    validated(kind, document, where)


def validated(kind: TypeAdapter[T], content: Any, where: str) -> T:
    """Plain values as the type that they should be.

    Args:
        kind: The type. Numbers and flags in it are strict (`Number`, `Flag`): pydantic would take texts too.
        content: The values.
        where: What they are of, for the message.

    Raises:
        UserError: Something is missing, unknown or not accepted; names its place, the value seen and what is
            accepted.
    """
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(_sentence(first, where)) from error


def validated_plain(kind: TypeAdapter[T], content: Any, where: str) -> T:
    """As `validated`, for values that JSON has: finite numbers, texts, lists and mappings, none for another.

    Raises:
        UserError: See `validated`; or a value is something else, or not finite.
    """
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {error}; accepted: finite numbers, texts, lists and mappings") from error
    try:
        return kind.validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(_sentence(error.errors(include_url=False)[0], where)) from error


def keys(kinds: Mapping[str, Any]) -> Any:
    """The type of a mapping that has these keys, each of a kind, and may have others."""
    make: Any = TypedDict
    return make("Keys", dict(kinds))


def list_of(kind: Any) -> Any:
    """The type of a list whose members are all of a kind, as `keys` makes one."""
    return GenericAlias(list, (kind,))


def mapping_to(kind: Any) -> Any:
    """The type of a mapping from names to a kind, as `keys` makes one."""
    return GenericAlias(dict, (str, kind))


def accepts(description: str) -> WrapValidator:
    """For `Annotated`: what a type accepts, in the words of an error message."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("accepts", "{accepted}", {"accepted": description}) from error

    return WrapValidator(check)


def known_keys(kind: type) -> BeforeValidator:
    """For `Annotated`, with a dataclass: a mapping has the keys of its fields only."""
    accepted = sorted(field.name for field in fields(kind))

    def check(value: Any) -> Any:
        unknown = [key for key in value if key not in accepted] if isinstance(value, Mapping) else []
        if unknown:
            raise UserError(f"unknown key {unknown[0]!r}; accepted: {', '.join(accepted)}")
        return value

    return BeforeValidator(check)


Flag = Annotated[bool, Field(strict=True), accepts("true, false")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), accepts("a finite number")]
Count = Annotated[int, Field(strict=True, ge=0), accepts("a count")]
CountAboveZero = Annotated[int, Field(strict=True, gt=0), accepts("a count above 0")]

_ACCEPTED = {
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_type": "a text",
    "float_type": "a number",
    "bool_type": "true, false",
}
"""Kinds of error -> what would have been accepted."""


def _sentence(error: ErrorDetails, where: str) -> str:
    if error["type"] == "missing":
        *above, key = error["loc"]
        has = ", ".join(str(one)[:60] for one in list(error["input"])[:20]) or "nothing"
        return f"{_place(where, above)}: needs {key!r}, and has {has}"
    return f"{_place(where, error['loc'])}: {_why(error)}"


def _why(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "literal_error":
        accepted = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
    else:
        accepted = _ACCEPTED.get(error["type"], error["msg"])
    return f"got {shown(error['input'])}, accepted: {accepted}"


def _place(where: str, loc: Iterable[int | str]) -> str:
    """Keys one after another; the first of `rules` is rule 1, that of `categories` category 1."""
    parts = [where]
    for part in loc:
        if isinstance(part, int):
            one = re.sub("ies$", "y", parts[-1]).removesuffix("s")
            parts[-1] = f"{one} {part + 1}"
        else:
            parts.append(part)
    return ", ".join(parts)
