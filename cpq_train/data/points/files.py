"""Reads the points of a file: .npy, .pcd, and raw columns in every other one."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.arrays import parse_npy
from cpq_train.common.errors import LoadingError, UserError
from cpq_train.data.points.format import DTYPES, WIDTHS, PointFormat
from cpq_train.data.points.pcd import PcdError, parse_pcd

Points = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_NUMBER_BYTES: Final = 8


class CloudError(LoadingError):
    """A cloud that cannot be used; the message names the file and the sample."""


class Columns(NamedTuple):
    """What a file holds.

    Attributes:
        names: of its columns where it has names, else those of the format.
        values: (P,) each, views of the file's content.
        layout: the content, where it is raw columns.
    """

    names: tuple[str, ...]
    values: list[NDArray[Any]]
    layout: Bytes | None = None


def read_points(path: Path, points: PointFormat, name: str) -> Points:
    """Reads a file as (P, F) `points.features`; a time lag that it does not have is 0.

    Args:
        path: the file.
        points: how its points lie in it.
        name: what to call it in messages.

    Raises:
        CloudError: it is missing, no regular one, empty, truncated, of other columns, or holds NaN or
            infinite values that are not to be dropped.
    """
    if points.is_nuscenes and is_raw(path):
        rows = _raw_rows(read_bytes(path, name), points, name)
        return _finite(rows, points, name, replace_last=True)
    return features_of(read_columns(path, points, name), points, name)


def is_raw(path: Path) -> bool:
    """Whether a file is raw columns, by its ending."""
    return path.suffix.lower() not in (".npy", ".pcd")


def read_bytes(path: Path, name: str) -> Bytes:
    """The content of a file.

    Raises:
        CloudError: it is missing, no regular one, or empty.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CloudError(f"{name} is no regular file")
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise CloudError(f"{name} cannot be read: {error.strerror}") from error
    if not len(content):
        raise CloudError(f"{name} is empty: 0 bytes")
    return content


def _raw_rows(content: Bytes, points: PointFormat, name: str) -> Points:
    _check_length(content, points, name)
    return content.view(np.float32).reshape(-1, len(points.columns))


def _check_length(content: Bytes, points: PointFormat, name: str) -> None:
    size, number = points.record.itemsize, len(content)
    if number % size:
        widths = fitting_widths(number)
        fit = f"; {' or '.join(widths)} would divide it" if widths else ""
        raise CloudError(
            f"{name} is truncated: {number} bytes, expected a multiple of {size}, or has other columns than "
            f"data.point_columns {points}{fit}"
        )


def fitting_widths(num_bytes: int) -> list[str]:
    """The usual columns that a number of bytes is a multiple of, in words."""
    words = []
    for dtype in ("float32", "float64"):
        fits = [str(width) for width in WIDTHS if not num_bytes % (width * DTYPES[dtype].itemsize)]
        words += [f"{', '.join(fits)} columns of {dtype}"] if fits else []
    return words


def read_columns(path: Path, points: PointFormat, name: str) -> Columns:
    """The columns of a file, as they lie in it.

    Raises:
        CloudError: see `read_points`; NaN and infinite values are none here.
    """
    content = read_bytes(path, name)
    if is_raw(path):
        _check_length(content, points, name)
        table = content.view(points.record)
        return Columns(points.names, [table[column] for column in points.names], content)
    found = _of_npy(content, name) if path.suffix.lower() == ".npy" else _of_pcd(content, name)
    _check_names(found, points, name)
    if not len(found.values[0]):
        raise CloudError(f"{name} is empty: no points")
    return Columns(points.names, found.values)


def _of_npy(content: Bytes, name: str) -> Columns:
    try:
        array = parse_npy(io.BytesIO(content.data), len(content))
    except UserError as error:
        raise CloudError(f"{name}: {error}") from error
    names = array.dtype.names
    if names is not None:
        dtypes = [array.dtype[field] for field in names]
        columns = [array[field] for field in names]
    else:
        dtypes = [array.dtype]
        columns = list(array.T) if array.ndim == 2 else []
    are_numbers = all(one.kind in "iuf" and one.itemsize <= _NUMBER_BYTES and not one.shape for one in dtypes)
    if array.ndim != (2 if names is None else 1) or not columns or not are_numbers:
        raise CloudError(
            f"{name} is of shape {array.shape} and dtype {str(array.dtype)[:200]}; accepted: (points, "
            "columns) of numbers, or (points,) of a record of numbers"
        )
    return Columns(names or (), columns)


def _of_pcd(content: Bytes, name: str) -> Columns:
    try:
        fields = parse_pcd(content.tobytes())
    except PcdError as error:
        raise CloudError(f"{name}: {error}") from error
    return Columns(tuple(fields), list(fields.values()))


def _check_names(found: Columns, points: PointFormat, name: str) -> None:
    """See that the columns of a file that names them, or counts them, are those of the format."""
    number = len(found.values)
    at = {column: i for i, column in enumerate(points.names)}
    is_moved = any(at.get(field, i) != i for i, field in enumerate(found.names))
    if number != len(points.columns) or is_moved:
        has = f"[{', '.join(found.names)}]" if found.names else f"{number} columns"
        raise CloudError(f"{name} has {has[:400]}; data.point_columns is {points}: expected the same")


def features_of(columns: Columns, points: PointFormat, name: str) -> Points:
    """Points (P, F) of a file's columns; each feature is contiguous.

    Raises:
        CloudError: one is NaN or infinite, and not to be dropped.
    """
    by_name = dict(zip(columns.names, columns.values, strict=True))
    rows = np.empty((len(points.features), len(columns.values[0])), dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite
        for row, feature in zip(rows, points.features, strict=True):
            row[:] = by_name.get(feature, 0.0)
            if feature == "intensity" and points.intensity_scale != 1:
                row *= np.float32(points.intensity_scale)
    return _finite(rows.T, points, name, replace_last=False)


def _finite(rows: Points, points: PointFormat, name: str, replace_last: bool) -> Points:
    """Points without those that hold NaN or infinite values, if they are to be dropped.

    Args:
        rows: (P, F)
        points: how they are read.
        name: for the message.
        replace_last: the last column is the ring, whose place the time lag takes.
    """
    is_finite = np.isfinite(rows)
    if not is_finite.all():
        bad = ~is_finite.all(axis=1)
        if not points.drop_nonfinite:
            raise CloudError(
                f"{name} holds NaN or infinite values in {np.count_nonzero(bad)} of {len(rows)} points, "
                f"first in point {int(np.argmax(bad))}: expected finite numbers "
                "(data.drop_nonfinite_points leaves such points out)"
            )
        rows = rows.T[:, ~bad].T
    if replace_last:
        rows[:, -1] = 0.0
    return rows
