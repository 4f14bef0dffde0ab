"""Other projects' loading of the same samples, to measure beside ours: OpenPCDet, nuscenes-devkit, spconv.

OpenPCDet is a checkout that the caller names; its data set runs unmodified, without its compiled extensions
and without GT sampling, on info records written from our index.
"""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.data.dataset import SampleConfig
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.sweeps import previous_frames, sweep_transform, time_lag_s


class Attributes(dict[str, Any]):
    """A dictionary whose keys are attributes too, which OpenPCDet's configurations are."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: _attributes(value) for key, value in values.items()})

    __getattr__ = dict.__getitem__


def _attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return Attributes(value)
    return [_attributes(each) for each in value] if isinstance(value, list) else value


def openpcdet_dataset(
    checkout: Path, index: NuScenesIndex, rows: list[int], sample: SampleConfig, folder: Path
) -> Any:
    """OpenPCDet's `NuScenesDataset` in training mode over some samples, in its 0.1 m or 0.075 m recipe.

    Args:
        checkout: OpenPCDet's repository.
        index: the data set.
        rows: the samples.
        sample: grid and limits.
        folder: where the info file is written.
    """
    sys.path.insert(0, str(checkout))
    for package in (
        "pcdet",
        "pcdet.datasets",
        "pcdet.datasets.augmentor",
        "pcdet.ops",
        "pcdet.ops.roiaware_pool3d",
    ):
        _stub(package).__path__ = [str(checkout / package.replace(".", "/"))]
    for missing in ("SharedArray", "torchvision", "pcdet.ops.roiaware_pool3d.roiaware_pool3d_cuda",
                    "pcdet.datasets.augmentor.database_sampler"):  # fmt: skip
        _stub(missing)
    _stub("skimage").transform = None  # type: ignore[attr-defined]
    from pcdet.datasets.nuscenes.nuscenes_dataset import NuScenesDataset

    config = yaml.safe_load((checkout / "tools/cfgs/dataset_configs/nuscenes_dataset.yaml").read_text())
    infos = folder / "infos.pkl"
    infos.write_bytes(pickle.dumps([_info(index, row, sample.num_sweeps) for row in rows]))
    config |= {
        "VERSION": ".",
        "INFO_PATH": {"train": [str(infos)]},
        "BALANCED_RESAMPLING": False,
        "POINT_CLOUD_RANGE": list(sample.point_cloud_range),
    }
    config["DATA_AUGMENTOR"]["DISABLE_AUG_LIST"] = ["gt_sampling"]
    config["DATA_PROCESSOR"][-1] |= {
        "VOXEL_SIZE": list(sample.voxel_size),
        "MAX_NUMBER_OF_VOXELS": {"train": sample.max_num_voxels},
    }
    logger = logging.getLogger("pcdet")
    return NuScenesDataset(Attributes(config), list(DETECTION_CLASSES), True, index.root, logger)


def _stub(name: str) -> ModuleType:
    return sys.modules.setdefault(name, ModuleType(name))


def _info(index: NuScenesIndex, row: int, num_sweeps: int) -> dict[str, Any]:
    where = index.annotations(row)
    names = np.array([*DETECTION_CLASSES, "ignore"])
    sweeps = [
        {
            "lidar_path": str(index.frame_paths[frame], "utf-8"),
            "transform_matrix": sweep_transform(index, row, frame),
            "time_lag": time_lag_s(index, row, frame),
        }
        for frame in previous_frames(index, row, num_sweeps)
    ]
    return {
        "lidar_path": str(index.frame_paths[index.sample_frames[row]], "utf-8"),
        "token": index.sample_token(row),
        "sweeps": sweeps,
        "gt_boxes": np.array(index.annotation_boxes[where]),
        "gt_names": names[index.annotation_classes[where]],
        "num_lidar_pts": np.array(index.annotation_num_lidar_pts[where]),
    }


def devkit_loader(index: NuScenesIndex, num_sweeps: int) -> Callable[[int], NDArray[np.float32]]:
    """nuscenes-devkit's `from_file_multisweep` by sample row."""
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud

    nusc = NuScenes(index.version, str(index.root), verbose=False)

    def load(row: int) -> NDArray[np.float32]:
        record = nusc.get("sample", index.sample_token(row))
        cloud, times = LidarPointCloud.from_file_multisweep(
            nusc, record, "LIDAR_TOP", "LIDAR_TOP", num_sweeps
        )
        points: NDArray[np.float32] = np.concatenate([cloud.points, times]).T
        return points

    return load


def spconv_voxelizer(sample: SampleConfig) -> Callable[[NDArray[np.float32]], tuple[Tensor, Tensor, Tensor]]:
    """The `PointToVoxel` of spconv and the mean of each voxel's slots."""
    from spconv.pytorch.utils import PointToVoxel

    voxelize = PointToVoxel(
        list(sample.voxel_size),
        list(sample.point_cloud_range),
        5,
        sample.max_num_voxels,
        sample.max_points_per_voxel,
    )

    def means(points: NDArray[np.float32]) -> tuple[Tensor, Tensor, Tensor]:
        voxels, cells, num_points = voxelize(torch.from_numpy(points))
        return voxels.sum(dim=1) / num_points[:, None].float(), cells, num_points

    return means
