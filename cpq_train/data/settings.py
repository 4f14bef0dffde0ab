"""What a checkpoint says of the data that it was made with: its top-level key `data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from typing_extensions import Self

from cpq_train.common.errors import UserError, shown
from cpq_train.data.points.format import NUSCENES_COLUMNS, PointFormat

DATA_KEY = "data"

CLASSES_KEY = "classes"
"""In the data of a checkpoint: the data set's own classes, where it had them."""

OF_POINTS: Final = {"point_columns", "intensity_scale"}
"""Settings that files of earlier releases do not hold: their points are nuScenes' own."""


@dataclass(frozen=True)
class DataSettings:
    """How points become the voxels of a sample; the defaults are those of nuScenes at 0.1 m.

    Attributes:
        num_sweeps: LiDAR sweeps per sample.
        voxel_size: x, y, z in metres.
        point_cloud_range: minimum x, y, z and maximum x, y, z in metres.
        max_points_per_voxel: further points of a voxel are dropped.
        max_num_voxels_train: further voxels of a training sample are dropped.
        max_num_voxels_eval: further voxels of a sample that is evaluated are dropped.
        point_columns: of the cloud files, see `PointFormat`.
        intensity_scale: what intensities were multiplied by.
    """

    num_sweeps: int = 10
    voxel_size: tuple[float, float, float] = (0.1, 0.1, 0.2)
    point_cloud_range: tuple[float, float, float, float, float, float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    max_points_per_voxel: int = 10
    max_num_voxels_train: int = 60000
    max_num_voxels_eval: int = 60000
    point_columns: tuple[str, ...] = NUSCENES_COLUMNS
    intensity_scale: float = 1.0

    @cached_property
    def points(self) -> PointFormat:
        """How points are read.

        Raises:
            UserError: The columns or the scale are no good.
        """
        return PointFormat(self.point_columns, self.intensity_scale)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any], path: str | Path) -> Self | None:
        """What a checkpoint says; None where it says nothing, as files do that were made before this key.

        Args:
            checkpoint: Its content.
            path: For messages.

        Raises:
            UserError: The key holds something else.
        """
        stated = checkpoint.get(DATA_KEY)
        if stated is None:
            return None
        names = {field.name for field in fields(cls)}
        where = f"checkpoint {str(path)!r}, {DATA_KEY}"
        if not isinstance(stated, Mapping) or not names - OF_POINTS <= stated.keys():
            have = sorted(stated) if isinstance(stated, Mapping) else repr(stated)
            raise UserError(f"{where}: {have}; expected {', '.join(sorted(names - OF_POINTS))}")
        held = {name: as_tuple(stated[name]) for name in names if name in stated}
        for name, value in held.items():
            if not _is_alike(value, getattr(cls, name)):
                raise UserError(
                    f"{where}.{name} is {shown(stated[name])}; expected something like {getattr(cls, name)}"
                )
        settings = cls(**held)
        try:
            _ = settings.points
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return settings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def _is_alike(value: Any, example: Any) -> bool:
    """Whether a value is a whole number, a number, so many numbers, or texts, as the example."""
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if example is NUSCENES_COLUMNS:
        return isinstance(value, tuple) and all(isinstance(one, str) for one in value)
    if isinstance(example, tuple):
        is_right_length = isinstance(value, tuple | list) and len(value) == len(example)
        return is_right_length and all(isinstance(one, int | float) for one in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def as_tuple(value: Any) -> Any:
    """A list as a tuple: files and configurations differ in that."""
    return tuple(value) if isinstance(value, list) else value
