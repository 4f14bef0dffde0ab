"""What a point of a cloud file is, and what of it the network sees."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from cpq_train.common.errors import UserError, shown

NUSCENES_COLUMNS: Final = ("x", "y", "z", "intensity", "ring")
TIME_LAG: Final = "time_lag"
DEFAULT_DTYPE: Final = "float32"
DTYPES: Final = {
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32)},
    **{f"int{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32)},
}
"""Of a column of a .bin file, by name; little-endian."""

MAX_COLUMNS: Final = 64
WIDTHS: Final = range(3, 9)
"""Numbers of columns that are looked for where those that are given do not fit."""

_POSITION: Final = ("x", "y", "z")
_NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class PointFormat:
    """How points lie in a file, and how they are read.

    Attributes:
        columns: names in the file's order, each `name` or `name:dtype`; the dtype counts in .bin files.
        intensity_scale: what `intensity` is multiplied by; the network expects 0 to 255.
        drop_nonfinite: leave points with NaN or infinite values out; else a file that holds one is an error.

    Raises:
        UserError: A column is no name or has an unknown dtype, one comes twice, x, y or z is missing, or the
            scale is no positive number or has no column.
    """

    columns: tuple[str, ...] = NUSCENES_COLUMNS
    intensity_scale: float = 1.0
    drop_nonfinite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        _check_columns(self)
        scale = self.intensity_scale
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"data.intensity_scale is {scale}: expected a number above 0")
        if scale != 1 and "intensity" not in self.names:
            raise UserError(
                f"data.intensity_scale is {scale:g}, and data.point_columns {self} has no intensity: "
                "expected 1, or such a column"
            )

    def __str__(self) -> str:
        """The columns as an option has them."""
        return f"[{', '.join(self.columns)}]"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in the file's order."""
        return tuple(column.partition(":")[0] for column in self.columns)

    @cached_property
    def record(self) -> np.dtype[Any]:
        """A point of a .bin file."""
        return np.dtype(
            [(name, DTYPES[_dtype_of(one)]) for name, one in zip(self.names, self.columns, strict=True)]
        )

    @cached_property
    def features(self) -> tuple[str, ...]:
        """What the network sees of a point: x, y, z, the other columns in order, and the time lag, last.

        `ring`, and columns whose names begin with `_`, are read past.
        """
        apart = {*_POSITION, "ring", TIME_LAG}
        others = (name for name in self.names if name not in apart and not name.startswith("_"))
        return (*_POSITION, *others, TIME_LAG)

    @cached_property
    def is_nuscenes(self) -> bool:
        """Whether files are nuScenes' own: float32 x, y, z, intensity, ring."""
        plain = tuple(column.removesuffix(f":{DEFAULT_DTYPE}") for column in self.columns)
        return plain == NUSCENES_COLUMNS and self.intensity_scale == 1

    @property
    def has_time_lag(self) -> bool:
        """Whether points bring a time lag of their own."""
        return TIME_LAG in self.names


def _dtype_of(column: str) -> str:
    return column.partition(":")[2] if ":" in column else DEFAULT_DTYPE


def _check_columns(points: PointFormat) -> None:
    for column in points.columns:
        if not isinstance(column, str) or not _NAME.fullmatch(column.partition(":")[0]):
            raise UserError(
                f"data.point_columns names {shown(column)}: expected name or name:dtype, of letters, digits "
                "and _"
            )
        if _dtype_of(column) not in DTYPES:
            raise UserError(f"data.point_columns has {column}: expected a dtype of {', '.join(DTYPES)}")
    twice = [name for name, number in Counter(points.names).items() if number > 1]
    missing = [name for name in _POSITION if name not in points.names]
    if twice or missing or len(points.columns) > MAX_COLUMNS:
        wrong = f"{twice[0]} twice" if twice else f"no {missing[0]}" if missing else f"{len(points.columns)}"
        raise UserError(
            f"data.point_columns {points} has {wrong}: expected x, y, z and others, each once, "
            f"{MAX_COLUMNS} at most"
        )
