"""Loads a sample's cloud: the key frame and the sweeps before it, moved into the key frame's LiDAR frame.

Follows OpenPCDet's rules: sweeps, not the key frame, lose the returns from the vehicle itself; a scene's
first samples, which have fewer sweeps behind them than asked for, repeat the oldest one.

Letters: P points, F features of a point, as `PointFormat` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.boxes import Float64, invert_poses, pose_matrices
from cpq_train.data.index import NuScenesIndex
from cpq_train.data.points.files import CloudError, read_points
from cpq_train.data.points.format import PointFormat

MAX_NUM_SWEEPS = 10
"""Key frames are 10 sweeps apart, so more would reach into the sample before."""

NUSCENES_POINTS = PointFormat()
"""How nuScenes' own files are read."""

BadSweeps = dict[int, str]
"""What is wrong with the cloud of a frame, by its row."""

_EGO_HALF_WIDTH_M = 1.0


def load_sweeps(
    index: NuScenesIndex,
    row: int,
    num_sweeps: int = MAX_NUM_SWEEPS,
    points: PointFormat = NUSCENES_POINTS,
    bad: BadSweeps | None = None,
) -> NDArray[np.float32]:
    """Loads the points of a sample.

    Args:
        index: the data set.
        row: the sample.
        num_sweeps: 1 (the key frame alone) to 10.
        points: how they lie in the files.
        bad: where it is given, clouds that cannot be used are left out, and noted here.

    Returns:
        (P, F) x, y, z in metres in the LiDAR frame of the key frame, further features (nuScenes: intensity, 0
        to 255), time lag in seconds (0 for the key frame, positive for the past). Key frame first, then back
        in time. Columns are contiguous (Fortran order): what changes a column passes over memory once.

    Raises:
        CloudError: a cloud is missing, truncated or holds NaN or infinite values.
    """
    key_frame = int(index.sample_frames[row])
    frames = previous_frames(index, row, num_sweeps)
    past = sorted(set(frames), reverse=True)
    matrices = sweep_transform(index, row, past)
    moved = {
        frame: _past_columns(index, frame, row, matrix, points, bad)
        for frame, matrix in zip(past, matrices, strict=True)
    }
    columns = [_usable_cloud(index, key_frame, row, points, bad).T, *(moved[frame] for frame in frames)]
    joined: NDArray[np.float32] = np.concatenate(columns, axis=1).T
    return joined


def previous_frames(index: NuScenesIndex, row: int, num_sweeps: int) -> list[int]:
    """Frame rows of the `num_sweeps - 1` sweeps before a sample's key frame, newest first.

    Where the scene starts too early the oldest sweep is repeated; a scene's first frame repeats itself.
    """
    frames: list[int] = []
    frame = int(index.sample_frames[row])
    while len(frames) < num_sweeps - 1:
        previous = int(index.frame_previous[frame])
        frame = frame if previous < 0 else previous
        frames.append(frame)
    return frames


def sweep_transform(index: NuScenesIndex, row: int, frame: int | Sequence[int]) -> Float64:
    """Matrix (4, 4) from a sweep's LiDAR frame to that of a sample's key frame, by way of the global one.

    Several sweeps give (K, 4, 4).
    """
    from_global = invert_poses(index.sample_ego_to_global[row])
    lidar_from_ego = invert_poses(index.sample_lidar_to_ego[row])
    to_global = pose_matrices(index.frame_ego_rotations[frame], index.frame_ego_translations[frame])
    ego_from_lidar = pose_matrices(index.frame_lidar_rotations[frame], index.frame_lidar_translations[frame])
    matrix: Float64 = lidar_from_ego @ from_global @ to_global @ ego_from_lidar
    return matrix


def time_lag_s(index: NuScenesIndex, row: int, frame: int) -> float:
    """Seconds from a sweep to a sample's key frame."""
    key_time_us = index.frame_times_us[index.sample_frames[row]]
    return float(1e-6 * key_time_us - 1e-6 * index.frame_times_us[frame])


def load_cloud(
    index: NuScenesIndex, frame: int, row: int, points: PointFormat = NUSCENES_POINTS
) -> NDArray[np.float32]:
    """Loads the file of a frame, see `read_cloud`.

    Raises:
        CloudError: the file is missing, no regular one, truncated or holds NaN or infinite values.
    """
    return read_cloud(index.frame_path(frame), f" of sample {index.sample_token(row)}", points)


def read_cloud(path: Path, of_sample: str = "", points: PointFormat = NUSCENES_POINTS) -> NDArray[np.float32]:
    """Reads one file as (P, F) features, of nuScenes' own x, y, z, intensity, 0.

    Args:
        path: the file.
        of_sample: which sample it belongs to, for messages.
        points: how they lie in the file.

    Raises:
        CloudError: the file is missing, no regular one, truncated or holds NaN or infinite values.
    """
    return read_points(path, points, f"cloud {path}{of_sample}")


def _usable_cloud(
    index: NuScenesIndex, frame: int, row: int, points: PointFormat, bad: BadSweeps | None
) -> NDArray[np.float32]:
    """The cloud of a frame; none of its points, and a note, where it cannot be used and that is accepted."""
    try:
        return load_cloud(index, frame, row, points)
    except CloudError as error:
        if bad is None:
            raise
        bad[frame] = str(error)
        return np.empty((0, len(points.features)), dtype=np.float32)


def _past_columns(
    index: NuScenesIndex,
    frame: int,
    row: int,
    to_key_frame: Float64,
    points: PointFormat,
    bad: BadSweeps | None,
) -> NDArray[np.float32]:
    """Columns (F, P) of a sweep in the key frame's LiDAR frame, without the returns from the vehicle."""
    cloud = _usable_cloud(index, frame, row, points, bad)
    is_ego = (np.abs(cloud[:, 0]) < _EGO_HALF_WIDTH_M) & (np.abs(cloud[:, 1]) < _EGO_HALF_WIDTH_M)
    kept = np.flatnonzero(~is_ego)
    num_features, adds = cloud.shape[1], points.has_time_lag
    columns = np.empty((num_features, len(kept)), dtype=np.float32)
    for axis in range(num_features if adds else num_features - 1):
        cloud[:, axis].take(kept, out=columns[axis], mode="clip")  # the default mode takes a detour
    lag_s = time_lag_s(index, row, frame)
    columns[-1] = columns[-1] + np.float32(lag_s) if adds else lag_s
    if frame != index.sample_frames[row]:
        columns[:3] = to_key_frame[:3, :3] @ columns[:3] + to_key_frame[:3, 3:]
    return columns
