"""Loads a sample's cloud: the key frame and the sweeps before it, moved into the key frame's LiDAR frame.

Follows OpenPCDet's rules: sweeps, not the key frame, lose the returns from the vehicle itself; a scene's
first samples, which have fewer sweeps behind them than asked for, repeat the oldest one.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpq_train.common.errors import LoadingError
from cpq_train.data.boxes import Float64, invert_poses, pose_matrices
from cpq_train.data.index import NuScenesIndex

MAX_NUM_SWEEPS = 10
"""Key frames are 10 sweeps apart, so more would reach into the sample before."""

_FILE_COLUMNS = 5  # x, y, z, intensity, ring
_POINT_BYTES = _FILE_COLUMNS * 4
_EGO_HALF_WIDTH_M = 1.0


class CloudError(LoadingError):
    """A cloud that cannot be used; the message names the file and the sample."""


def load_sweeps(index: NuScenesIndex, row: int, num_sweeps: int = MAX_NUM_SWEEPS) -> NDArray[np.float32]:
    """Loads the points of a sample.

    Args:
        index: the data set.
        row: the sample.
        num_sweeps: 1 (the key frame alone) to 10.

    Returns:
        (P, 5) x, y, z in metres in the LiDAR frame of the key frame, intensity 0 to 255, time lag in seconds
        (0 for the key frame, positive for the past). Key frame first, then back in time. Columns are
        contiguous (Fortran order), so that what changes a column passes over memory once.

    Raises:
        CloudError: a cloud is missing, truncated or holds NaN or infinite values.
    """
    key_frame = int(index.sample_frames[row])
    frames = previous_frames(index, row, num_sweeps)
    past = sorted(set(frames), reverse=True)
    matrices = sweep_transform(index, row, past)
    moved = {
        frame: _load_past_cloud(index, frame, row, matrix)
        for frame, matrix in zip(past, matrices, strict=True)
    }
    columns = [load_cloud(index, key_frame, row).T, *(moved[frame] for frame in frames)]
    points: NDArray[np.float32] = np.concatenate(columns, axis=1).T
    return points


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


def load_cloud(index: NuScenesIndex, frame: int, row: int) -> NDArray[np.float32]:
    """Loads the file of a frame, see `read_cloud`.

    Raises:
        CloudError: the file is missing, no regular one, truncated or holds NaN or infinite values.
    """
    return read_cloud(index.frame_path(frame), f" of sample {index.sample_token(row)}")


def read_cloud(path: Path, of_sample: str = "") -> NDArray[np.float32]:
    """Reads one file of float32 x, y, z, intensity, ring as (P, 5) x, y, z, intensity, 0.

    Args:
        path: the file.
        of_sample: which sample it belongs to, for messages.

    Raises:
        CloudError: the file is missing, no regular one, truncated or holds NaN or infinite values.
    """
    name = f"cloud {path}{of_sample}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CloudError(f"{name} is no regular file")
        values = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise CloudError(f"{name} cannot be read: {error.strerror}") from error
    if len(values) == 0 or len(values) % _POINT_BYTES:
        raise CloudError(f"{name} is truncated: {len(values)} bytes, expected a multiple of {_POINT_BYTES}")
    points = values.view(np.float32).reshape(-1, _FILE_COLUMNS)
    _check_finite(points, name)
    points[:, 4] = 0.0
    return points


def _check_finite(points: NDArray[np.float32], name: str) -> None:
    is_finite = np.isfinite(points)
    if not is_finite.all():
        bad = ~is_finite.all(axis=1)
        raise CloudError(
            f"{name} holds NaN or infinite values in {np.count_nonzero(bad)} of "
            f"{len(points)} points, first in point {int(np.argmax(bad))}: expected finite numbers"
        )


def _load_past_cloud(
    index: NuScenesIndex, frame: int, row: int, to_key_frame: Float64
) -> NDArray[np.float32]:
    """Columns (5, P) of a sweep in the key frame's LiDAR frame, without the returns from the vehicle."""
    cloud = load_cloud(index, frame, row)
    is_ego = (np.abs(cloud[:, 0]) < _EGO_HALF_WIDTH_M) & (np.abs(cloud[:, 1]) < _EGO_HALF_WIDTH_M)
    kept = np.flatnonzero(~is_ego)
    columns = np.empty((_FILE_COLUMNS, len(kept)), dtype=np.float32)
    for axis in range(4):
        cloud[:, axis].take(kept, out=columns[axis], mode="clip")  # the default mode takes a detour
    columns[4] = 0.0
    if frame != index.sample_frames[row]:
        columns[:3] = to_key_frame[:3, :3] @ columns[:3] + to_key_frame[:3, 3:]
        columns[4] = time_lag_s(index, row, frame)
    return columns
