"""Whether a cloud can be what its format says: what is read by a wrong one is garbage, and looks like it.

Thresholds are shares: single odd points are no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.index import NuScenesIndex
from cpq_train.data.points.files import CloudError, Columns, read_columns
from cpq_train.data.points.format import DEFAULT_DTYPE, TIME_LAG, WIDTHS, PointFormat
from cpq_train.data.points.layout import better_size

MAX_COORDINATE_M: Final = 1000.0
"""Farther than any return."""

MAX_INTENSITY: Final = 255.0
MAX_RING: Final = 255
MAX_TIME_LAG_S: Final = 60.0
"""To the file's own time; times since 1970 or since the start, and in other units, are beyond."""

_MAX_SHARE: Final = 0.02
_MAX_DROPPED: Final = 0.98
_NUM_POINTS: Final = 20000
"""Looked at, evenly spread over the file."""

_MIN_FOR_RANGE: Final = 100
"""So many points would hold another intensity or place."""

_SCALES: Final = (1.0, 255.0, *(MAX_INTENSITY / top for top in (4095.0, 65535.0)))
"""Of intensities from 0 to 255, 1, and what 12 and 16 bits hold."""

NUM_FILES: Final = 3
_NUM_TRIED: Final = 64


def check_files(index: NuScenesIndex, points: PointFormat, skips_bad: bool = False) -> None:
    """Looks at a few clouds of a data set; files that are not there are passed over.

    Args:
        index: the data set.
        points: how points lie in its files.
        skips_bad: pass over files that cannot be used, too, unless none of those looked at can.

    Raises:
        CloudError: see `check_cloud`.
    """
    frames = np.linspace(0, len(index.frame_times_us) - 1, _NUM_TRIED).astype(np.int64)
    paths = [path for path in map(index.frame_path, np.unique(frames).tolist()) if path.is_file()]
    places = np.unique(np.linspace(0, len(paths) - 1, NUM_FILES).astype(np.int64)) if paths else ()
    errors = [check_cloud(paths[place], points, skips_bad) for place in places]
    if (first := next(iter(errors), None)) and all(errors):
        raise first


def check_cloud(path: Path, points: PointFormat, skips_bad: bool = False) -> CloudError | None:
    """Looks at a sample of a file's points.

    Args:
        path: the file.
        points: how its points lie in it.
        skips_bad: return what is wrong with a file that cannot be used.

    Raises:
        CloudError: it cannot be used, or is not what the format says; names what was seen, and what would
            fit.
    """
    name = f"cloud {path}"
    try:
        columns = read_columns(path, points, name)
    except CloudError as error:
        if skips_bad:
            return error
        raise
    misfit = _misfit(columns, points, name)
    if misfit is None or (skips_bad and _oddity(columns, points, max_bad=1.0) is None):
        return misfit
    raise misfit


def _misfit(columns: Columns, points: PointFormat, name: str) -> CloudError | None:
    """What is not as the format says."""
    size = _better_size(columns, points)
    if size is not None:
        seen: str | None = f"mixed columns in points of {points.record.itemsize} bytes"
    else:
        seen = _oddity(columns, points)
    if seen is None:
        return None
    fit = _remedy(columns, points, size)
    return CloudError(f"{name} holds {seen}, read by data.point_columns {points}{fit}")


def _better_size(columns: Columns, points: PointFormat) -> int | None:
    """Bytes of a point that a raw file clearly has, if they are others."""
    return None if columns.layout is None else better_size(columns.layout, points.record)


def _oddity(columns: Columns, points: PointFormat, max_bad: float | None = None) -> str | None:
    """What of the values cannot be; None where all can.

    Args:
        columns: The file's.
        points: How they are read.
        max_bad: Share of points that may hold NaN or infinite values; None for what the format accepts.
    """
    step = max(1, len(columns.values[0]) // _NUM_POINTS)
    with np.errstate(over="ignore", invalid="ignore"):
        sample = {
            name: values[::step].astype(np.float64)
            for name, values in zip(columns.names, columns.values, strict=True)
            if not name.startswith("_")
        }
    is_finite = np.logical_and.reduce([np.isfinite(values) for values in sample.values()])
    if max_bad is None:
        max_bad = _MAX_DROPPED if points.drop_nonfinite else _MAX_SHARE
    finite = {name: values[is_finite] for name, values in sample.items()}
    seen = _odd_values(finite, points) if is_finite.any() else None
    if seen is None and (bad := 1 - float(is_finite.mean())) > max_bad:
        seen = f"NaN or infinite values in {_percent(bad)} of its points"
    return seen


def _odd_values(sample: dict[str, NDArray[np.float64]], points: PointFormat) -> str | None:
    position = [sample[axis] for axis in "xyz"]
    number = len(position[0])
    far = float(np.mean(np.max(np.abs(position), axis=0) > MAX_COORDINATE_M))
    if far > _MAX_SHARE:
        return f"points beyond {MAX_COORDINATE_M:g} m, {_percent(far)} of all"
    if number >= _MIN_FOR_RANGE and all(np.ptp(values) == 0 for values in position):
        return f"points that all lie at {', '.join(f'{values[0]:g}' for values in position)} m"
    ring = sample.get("ring", np.zeros(0))
    is_ring = (ring >= 0) & (ring <= MAX_RING) & (ring == np.round(ring))
    if len(ring) and (share := float(np.mean(~is_ring))) > _MAX_SHARE:
        return f"rings that are no whole numbers from 0 to {MAX_RING}{_of(ring[~is_ring], share)}"
    lag_s = np.abs(sample.get(TIME_LAG, np.zeros(0)))
    is_far = lag_s > MAX_TIME_LAG_S
    if len(lag_s) and (share := float(np.mean(is_far))) > _MAX_SHARE:
        return (
            f"time lags beyond {MAX_TIME_LAG_S:g} s{_of(lag_s[is_far], share)}, where seconds to the file's "
            "own time are expected (under a name that begins with _ a column is read past)"
        )
    return _odd_intensity(sample["intensity"], points) if "intensity" in sample else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _of(odd: NDArray[np.float64], share: float) -> str:
    return f" (such as {odd[0]:g}), {_percent(share)} of all"


def _odd_intensity(raw: NDArray[np.float64], points: PointFormat) -> str | None:
    scaled = raw * points.intensity_scale
    beyond = (scaled < 0) | (scaled > MAX_INTENSITY * (1 + 1e-6))
    top = float(np.max(scaled, initial=0))
    if (share := float(np.mean(beyond))) > _MAX_SHARE:
        return f"intensities outside 0 to {MAX_INTENSITY:g}{_of(scaled[beyond], share)}"
    if len(raw) >= _MIN_FOR_RANGE and 0 < top <= 1 and points.intensity_scale == 1:
        return f"no intensity above {top:g} where the network expects 0 to 255"
    return None


def _remedy(columns: Columns, points: PointFormat, size: int | None) -> str:
    """The options that would fit, in words.

    Args:
        columns: The file's, as they are read.
        points: What does not fit.
        size: Of a point, or a part of it, where it is another one.
    """
    if size is None:
        for other in _scaled(points) if "intensity" in points.names else ():
            if _oddity(columns, other) is None:
                return f"; data.intensity_scale {other.intensity_scale:.6g} would fit"
        if _oddity(columns, replace(points, drop_nonfinite=True)) is None:
            return "; data.drop_nonfinite_points true would leave such points out"
    content = columns.layout
    if content is None:
        return ""
    for other in _usual_formats(points, size or 1):
        if len(content) % other.record.itemsize:
            continue
        table = content.view(other.record)
        found = Columns(other.names, [table[name] for name in other.names], content)
        for one in _scaled(other) if "intensity" in other.names else (other,):
            if _oddity(found, one) is None and (size or _better_size(found, one) is None):
                scale = (
                    ""
                    if one.intensity_scale == 1
                    else f" with data.intensity_scale {one.intensity_scale:.6g}"
                )
                return f"; data.point_columns {one}{scale} would fit"
    return ""


def _scaled(points: PointFormat) -> Iterator[PointFormat]:
    return (replace(points, intensity_scale=scale) for scale in _SCALES)


def _usual_formats(points: PointFormat, size: int) -> list[PointFormat]:
    """What files may be whose points have a multiple of so many bytes: the smallest and most usual first."""
    heads = (("x", "y", "z", "intensity", "ring"), ("x", "y", "z", "intensity"), ("x", "y", "z"))
    found = []
    for head, dtype, width in product(heads, ("float32", "float64"), WIDTHS):
        names = (*head, *(f"_{place + 1}" for place in range(len(head), width)))
        ending = "" if dtype == DEFAULT_DTYPE else f":{dtype}"
        other = replace(points, columns=tuple(f"{name}{ending}" for name in names), intensity_scale=1.0)
        fits = width >= len(head) and other.record.itemsize % size == 0
        if fits and other.columns != points.columns:
            found.append(other)
    return sorted(found, key=lambda one: one.record.itemsize) if size > 1 else found
