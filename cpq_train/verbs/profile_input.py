"""What `profile` is asked for, and the cloud that it measures on.

Letters: P points, V voxels, F features of a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from cpq_train.common.errors import UserError
from cpq_train.data.clouds import Cloud, synthetic_cloud
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import points_of, voxelizer_of
from cpq_train.data.points.checks import check_cloud
from cpq_train.data.points.format import PointFormat
from cpq_train.data.sweeps import read_cloud

FIRST = "first"
SYNTHETIC_SEED = 0
_ORDER_SEED = 0
"""Points are shuffled as evaluation shuffles them, so that a limit on voxels leaves a mix of sweeps."""


@dataclass(frozen=True)
class ProfileSettings:
    """What to profile, and on what; see `QuantTrainer.profile`.

    Raises:
        UserError: They contradict one another.
    """

    output: Path | None = None
    sample: str | None = None
    cloud: Path | None = None
    num_passes: int = 5
    trace: bool = False
    training_step: bool = False
    checkpoints: Sequence[Path] = ()
    engine_file: Path | None = None

    def __post_init__(self) -> None:
        if self.sample is not None and self.cloud is not None:
            raise UserError(f"--sample {self.sample} and --cloud {self.cloud} are both given: expected one")
        if self.num_passes < 1:
            raise UserError(f"--num_passes is {self.num_passes}: expected 1 or more")
        if self.trace and self.output is None:
            raise UserError("--trace needs --output, the folder that trace.json is written to")
        if self.engine_file is not None and not self.checkpoints:
            raise UserError(
                f"--engine_file {self.engine_file} is measured beside checkpoints, and none is given: "
                "accepted: profile CHECKPOINT... --engine_file FILE"
            )
        files = [path.resolve() for path in self.checkpoints]
        if twice := [str(path) for path in self.checkpoints if files.count(path.resolve()) > 1]:
            raise UserError(f"{' and '.join(twice)} are one checkpoint: accepted: each file once")


@dataclass(frozen=True)
class OneCloud:
    """The voxels of a cloud on a device.

    Attributes:
        features_VF: Mean of the points of each voxel.
        coords_V3: Its z, y, x.
        num_points: P.
        device: Where they are.
        points: How points were read.
    """

    features_VF: Tensor
    coords_V3: Tensor
    num_points: int
    device: torch.device
    points: PointFormat

    @classmethod
    def of(cls, data: NuScenesDataModule, settings: ProfileSettings, device: torch.device) -> Self:
        """Of the cloud that is asked for.

        Raises:
            UserError: There is none.
        """
        points = _points(data, settings)
        order = np.random.default_rng(_ORDER_SEED).permutation(len(points))
        features_VF, coords_V3, _ = voxelizer_of(data.evaluation_config)(points, order)
        how = data.evaluation_config.points
        return cls(features_VF.to(device), coords_V3.to(device), len(points), device, how)

    def batch(self) -> dict[str, Any]:
        """What a detector takes."""
        batch_column = torch.zeros_like(self.coords_V3[:, :1])
        return {
            "voxel_features": self.features_VF,
            "voxel_coords": torch.cat([batch_column, self.coords_V3], dim=1),
            "batch_size": 1,
        }

    def training_batch(self) -> dict[str, Any]:
        """The same as a training batch, without boxes."""
        return {**self.batch(), "gt_boxes": torch.zeros(1, 0, 10, device=self.device)}

    def context(self, settings: ProfileSettings) -> dict[str, Any]:
        """What is measured on, as plain values."""
        on_cuda = self.device.type == "cuda"
        return {
            "input": str(settings.cloud or settings.sample or "synthetic"),
            "num_points": self.num_points,
            "num_voxels": len(self.coords_V3),
            "device": torch.cuda.get_device_name(self.device) if on_cuda else "cpu",
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_passes": settings.num_passes,
        }


def _points(data: NuScenesDataModule, settings: ProfileSettings) -> Cloud:
    config = data.evaluation_config
    if settings.cloud is not None:
        check_cloud(settings.cloud, config.points)
        return read_cloud(settings.cloud, points=config.points)
    if settings.sample is None:
        return synthetic_cloud(config.num_sweeps, SYNTHETIC_SEED, config.points)
    data.prepare_data()
    is_first = settings.sample == FIRST
    rows = data.eval_rows if is_first else data.index.sample_rows(None, [settings.sample])
    return points_of(data.index, int(rows[0]), config)
