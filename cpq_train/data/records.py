"""What a record of each of nuScenes' tables holds: every record that the index uses is checked.

Values are checked here, one record at a time; what records say of each other (tokens that occur twice, links
that lead nowhere or in a circle) is checked where they meet, in `index_builder` and `annotation_columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import hypot
from pathlib import PurePosixPath
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from cpq_train.common.errors import UserError, shown
from cpq_train.common.schema import keys, list_of

Record = dict[str, Any]
T = TypeVar("T")

MAX_TOKEN_LENGTH = 128
MAX_PATH_LENGTH = 512
MAX_TRANSLATION_M = 1e9
MAX_SIZE_M = 1e6
_QUATERNION_TOLERANCE = 1e-3


class _Kind(NamedTuple):
    type: Any
    accepted: str


def _is_inside(path: str) -> str:
    if path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts):
        raise ValueError
    return path


def _is_unit(quaternion: list[float]) -> list[float]:
    if abs(hypot(*quaternion) - 1) > _QUATERNION_TOLERANCE:
        raise ValueError
    return quaternion


def _text(least: int, most: int) -> Any:
    return Annotated[str, Field(strict=True, min_length=least, max_length=most)]


def _numbers(length: int, **bounds: float) -> Any:
    number = Annotated[float, Field(strict=True, allow_inf_nan=False, **bounds)]
    return Annotated[list_of(number), Field(min_length=length, max_length=length)]


def _integer(most: int) -> Any:
    return Annotated[int, Field(strict=True, ge=0, le=most)]


_TOKEN = _Kind(_text(1, MAX_TOKEN_LENGTH), f"a token: 1 to {MAX_TOKEN_LENGTH} printable characters")
_LINK = _Kind(_text(0, MAX_TOKEN_LENGTH), "a token, or an empty text")
_NAME = _Kind(_text(1, MAX_TOKEN_LENGTH), f"a name: 1 to {MAX_TOKEN_LENGTH} printable characters")
_TIME = _Kind(_integer(2**63 - 1), "a whole number of microseconds")
_COUNT = _Kind(_integer(2**31 - 1), "a count")
_TRANSLATION = _Kind(
    _numbers(3, ge=-MAX_TRANSLATION_M, le=MAX_TRANSLATION_M),
    f"3 numbers (m) of at most {MAX_TRANSLATION_M:g}",
)
_SIZE = _Kind(_numbers(3, gt=0, le=MAX_SIZE_M), f"3 numbers (m) above 0, of at most {MAX_SIZE_M:g}")
_ROTATION = _Kind(Annotated[_numbers(4), AfterValidator(_is_unit)], "a unit quaternion: 4 numbers w, x, y, z")

_POSE = {"rotation": _ROTATION, "translation": _TRANSLATION}
FIELDS: dict[str, dict[str, _Kind]] = {
    "category": {"token": _TOKEN, "name": _NAME},
    "attribute": {"token": _TOKEN, "name": _NAME},
    "sensor": {"token": _TOKEN, "channel": _NAME},
    "calibrated_sensor": {"token": _TOKEN, "sensor_token": _TOKEN, **_POSE},
    "scene": {"token": _TOKEN, "name": _NAME},
    "sample": {"token": _TOKEN, "scene_token": _TOKEN, "timestamp": _TIME},
    "sample_data": {
        "token": _TOKEN,
        "sample_token": _TOKEN,
        "ego_pose_token": _TOKEN,
        "calibrated_sensor_token": _TOKEN,
        "timestamp": _TIME,
        "is_key_frame": _Kind(Annotated[bool, Field(strict=True)], "true, false"),
        "filename": _Kind(
            Annotated[_text(1, MAX_PATH_LENGTH), AfterValidator(_is_inside)],
            f"a path inside the data root, of at most {MAX_PATH_LENGTH} printable characters",
        ),
        "prev": _LINK,
    },
    "ego_pose": {"token": _TOKEN, **_POSE},
    "instance": {"token": _TOKEN, "category_token": _TOKEN},
    "sample_annotation": {
        "token": _TOKEN,
        "sample_token": _TOKEN,
        "instance_token": _TOKEN,
        "attribute_tokens": _Kind(list_of(_TOKEN.type), "a list of tokens"),
        "translation": _TRANSLATION,
        "size": _SIZE,
        "rotation": _ROTATION,
        "prev": _LINK,
        "next": _LINK,
        "num_lidar_pts": _COUNT,
        "num_radar_pts": _COUNT,
    },
}
"""What the index takes from each table."""


def record_check(table: str) -> Callable[[Record, int], None]:
    """A function that checks a record of a table, given the record and its row.

    It raises a `UserError` that names table, record, field, the value seen and what is accepted.
    """
    kinds = FIELDS[table]
    validate = TypeAdapter(keys({name: kind.type for name, kind in kinds.items()})).validator.validate_python

    def check(record: Record, row: int) -> None:
        try:
            validate(record)
        except ValidationError as error:
            field = str(error.errors(include_url=False)[0]["loc"][0])
            where = named(table, record, row)
            if field not in record:
                raise UserError(f"{where} has no {field!r}; accepted: {kinds[field].accepted}") from error
            refuse(f"{where}: {field}", record[field], kinds[field].accepted)

    return check


def named(table: str, record: Record, row: int = 0) -> str:
    """A record in a message: by its token, or by its row (the first is 1) where it has none."""
    token = record.get("token")
    return f"table {table}, record {shown(token) if isinstance(token, str) and token else row + 1}"


def twice(table: str, token: str, what: str = "token") -> NoReturn:
    """Refuse what two records of a table share.

    Raises:
        UserError: always.
    """
    raise UserError(f"table {table}: {what} {shown(token)} occurs twice; accepted: every {what} once")


def refuse(what: str, value: object, accepted: str) -> NoReturn:
    """Say what is wrong with a value of a table.

    Raises:
        UserError: always.
    """
    raise UserError(f"{what} is {shown(value)}; accepted: {accepted}")


def refuse_first(is_bad: NDArray[np.bool_], token_of: Callable[[int], str], table: str, problem: str) -> None:
    """Name the first record of which a column says something wrong.

    Args:
        is_bad: (N,) by record.
        token_of: the token of the record at a row.
        table: the table.
        problem: the field, what is wrong with it, and what is accepted.

    Raises:
        UserError: there is one.
    """
    if is_bad.any():
        raise UserError(f"table {table}, record {shown(token_of(int(is_bad.argmax())))}: {problem}")


def referred(known: Mapping[str, T], target: str, table: str, record: Record, field: str) -> T:
    """What is known of the record that another one refers to.

    Args:
        known: by token of the target table.
        target: the table that is referred to.
        table: the table that refers to it.
        record: of that table, checked.
        field: the reference.

    Raises:
        UserError: there is no such record.
    """
    if record[field] not in known:
        refuse(f"{named(table, record)}: {field}", record[field], f"the token of a record of table {target}")
    return known[record[field]]


def byte_strings(strings: list[str], table: str, field: str) -> NDArray[np.bytes_]:
    """Texts of a field as a column of UTF-8 bytes.

    Raises:
        UserError: one holds a control character; a NUL at its end would be lost here.
    """
    if not "".join(strings).isprintable():
        row, text = next((row, text) for row, text in enumerate(strings) if not text.isprintable())
        refuse(f"table {table}, record {row + 1}: {field}", text, FIELDS[table][field].accepted)
    return np.array([text.encode() for text in strings], dtype=np.bytes_)


def is_in_circle(previous: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which records (N,) have no first one before them, given the row before each, -1 where there is none."""
    behind = previous
    for _ in range(len(previous).bit_length()):  # 1, 2, 4, ... records further back
        if (behind < 0).all():
            break
        behind = np.where(behind < 0, behind, behind[behind])
    return behind >= 0
