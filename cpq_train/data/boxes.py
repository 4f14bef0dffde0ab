"""Rigid transforms and 3-D boxes: quaternions, poses, LiDAR frame to global frame and back.

A box row has nine columns `x y z l w h yaw vx vy`: centre and extents in metres, yaw in radians
(counter-clockwise around z, 0 along x), velocity in m/s over ground expressed in the box's frame of
reference. Quaternions are `w x y z`. Shape letters: N boxes or poses, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]

YAW = 6
"""Column of the yaw angle in a box row."""


class GlobalBoxes(NamedTuple):
    """Boxes in nuScenes' global frame, as submissions and tables write them.

    Attributes:
        translation: (N, 3) centres in metres.
        size_wlh: (N, 3) width, length, height in metres.
        rotation: (N, 4) unit quaternions.
        velocity: (N, 2) m/s in the global x-y plane.
    """

    translation: Float64
    size_wlh: Float64
    rotation: Float64
    velocity: Float64


def rotation_matrices(quaternions: Float) -> Float64:
    """Turns quaternions (..., 4), of any non-zero length, into rotation matrices (..., 3, 3)."""
    q = np.asarray(quaternions, dtype=np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def multiply_quaternions(left: Float, right: Float) -> Float64:
    """Hamilton product of quaternions (..., 4): first `right` is applied, then `left`."""
    a, b, c, d = np.moveaxis(np.asarray(left, dtype=np.float64), -1, 0)
    w, x, y, z = np.moveaxis(np.asarray(right, dtype=np.float64), -1, 0)
    return np.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        axis=-1,
    )


def yaw_quaternions(yaws_rad: Float) -> Float64:
    """Rotations (..., 4) around z by the angles (...)."""
    half = np.asarray(yaws_rad, dtype=np.float64) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=-1)


def pose_matrices(rotations: Float, translations_m: Float) -> Float64:
    """Homogeneous matrices (..., 4, 4) that map points of the posed frame into its parent."""
    matrices = np.zeros((*np.shape(translations_m)[:-1], 4, 4))
    matrices[..., :3, :3] = rotation_matrices(rotations)
    matrices[..., :3, 3] = translations_m
    matrices[..., 3, 3] = 1.0
    return matrices


def invert_poses(matrices: Float64) -> Float64:
    """Inverses (..., 4, 4) of rigid transforms, by transposing the rotation."""
    inverses = np.zeros_like(matrices)
    transposed = np.swapaxes(matrices[..., :3, :3], -1, -2)
    inverses[..., :3, :3] = transposed
    inverses[..., :3, 3] = -np.einsum("...ij,...j->...i", transposed, matrices[..., :3, 3])
    inverses[..., 3, 3] = 1.0
    return inverses


def wrap_angles(angles_rad: Float) -> Float:
    """Angles in [-pi, pi) that differ from the given ones by whole turns; the precision is kept."""
    turn = angles_rad.dtype.type(2 * np.pi)
    wrapped: Float = angles_rad - np.floor(angles_rad / turn + angles_rad.dtype.type(0.5)) * turn
    return wrapped


def global_to_lidar(
    translations_m: Float64,
    sizes_wlh_m: Float64,
    rotations: Float64,
    velocities_mps: Float64,
    lidar_to_global: Float64,
) -> Float64:
    """Expresses annotated boxes in the LiDAR frame of their key frame.

    The yaw is the direction of the rotated x axis, as OpenPCDet's info files have it: what little pitch and
    roll the vehicle has is dropped.

    Args:
        translations_m: (N, 3) global centres.
        sizes_wlh_m: (N, 3) width, length, height.
        rotations: (N, 4) global orientations.
        velocities_mps: (N, 3) global velocities; NaN where unknown.
        lidar_to_global: (N, 4, 4) or (4, 4) pose of the sensor.

    Returns:
        (N, 9) box rows.
    """
    to_lidar = invert_poses(lidar_to_global)
    turn = to_lidar[..., :3, :3]
    centres = np.einsum("...ij,...j->...i", turn, translations_m) + to_lidar[..., :3, 3]
    forward = np.einsum("...ij,...j->...i", turn, rotation_matrices(rotations)[..., 0])
    velocities = np.einsum("...ij,...j->...i", turn, velocities_mps)[..., :2]
    yaws = np.arctan2(forward[..., 1], forward[..., 0])[..., None]
    return np.concatenate([centres, sizes_wlh_m[..., [1, 0, 2]], yaws, velocities], axis=-1)


def lidar_to_global(
    boxes_N9: Float,
    lidar_rotation: Float64,
    lidar_translation_m: Float64,
    ego_rotation: Float64,
    ego_translation_m: Float64,
) -> GlobalBoxes:
    """Expresses boxes of one sample's LiDAR frame in the global frame, as a submission wants them.

    Args:
        boxes_N9: (N, 9) box rows in the LiDAR frame of the key frame.
        lidar_rotation: (4,) orientation of the sensor in the ego frame (table `calibrated_sensor`).
        lidar_translation_m: (3,) position of the sensor in the ego frame.
        ego_rotation: (4,) orientation of the vehicle in the global frame (table `ego_pose`).
        ego_translation_m: (3,) position of the vehicle in the global frame.
    """
    boxes = np.asarray(boxes_N9, dtype=np.float64)
    lidar_turn, ego_turn = rotation_matrices(lidar_rotation), rotation_matrices(ego_rotation)
    centres = (boxes[:, :3] @ lidar_turn.T + lidar_translation_m) @ ego_turn.T + ego_translation_m
    flat_velocities = np.concatenate([boxes[:, 7:9], np.zeros((len(boxes), 1))], axis=1)
    velocities = (flat_velocities @ lidar_turn.T) @ ego_turn.T
    rotations = multiply_quaternions(lidar_rotation, yaw_quaternions(boxes[:, YAW]))
    rotations = multiply_quaternions(ego_rotation, rotations)
    return GlobalBoxes(centres, boxes[:, [4, 3, 5]], rotations, velocities[:, :2])


def is_inside(boxes: Float64, point_cloud_range: Sequence[float]) -> NDArray[np.bool_]:
    """Whether each box centre (N,) lies in the range, its faces included."""
    low, high = np.asarray(point_cloud_range[:3]), np.asarray(point_cloud_range[3:])
    inside: NDArray[np.bool_] = ((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(axis=1)
    return inside
