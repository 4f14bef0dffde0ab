"""Rotations and flat rectangles. Angles in radians, lengths in metres, yaw counter-clockwise about z.

Letters: N rectangles, T times, P points.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def quaternion_to_matrix(quaternion_wxyz: Array) -> Array:
    """Rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion_wxyz / np.linalg.norm(quaternion_wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def multiply_quaternions(left_wxyz: Array, right_wxyz: Array) -> Array:
    """Hamilton product: the rotation `right` followed by `left`."""
    a, b = left_wxyz[0], left_wxyz[1:]
    c, d = right_wxyz[0], right_wxyz[1:]
    return np.concatenate([[a * c - b @ d], a * d + c * b + np.cross(b, d)])


def yaw_pitch_roll_quaternion(yaw_rad: float, pitch_rad: float = 0.0, roll_rad: float = 0.0) -> Array:
    """Quaternion (w, x, y, z) of Rz(yaw) Ry(pitch) Rx(roll)."""
    about_z = np.array([np.cos(yaw_rad / 2), 0.0, 0.0, np.sin(yaw_rad / 2)])
    about_y = np.array([np.cos(pitch_rad / 2), 0.0, np.sin(pitch_rad / 2), 0.0])
    about_x = np.array([np.cos(roll_rad / 2), np.sin(roll_rad / 2), 0.0, 0.0])
    return multiply_quaternions(about_z, multiply_quaternions(about_y, about_x))


def rotate(points: Array, matrix: Array) -> Array:
    """Rotates points (..., 3) without BLAS, whose sums may depend on its number of threads."""
    columns = [points[..., 0] * row[0] + points[..., 1] * row[1] + points[..., 2] * row[2] for row in matrix]
    return np.stack(columns, axis=-1)


def to_local(xy: Array, pose_xyyaw: Array) -> tuple[Array, Array]:
    """Coordinates of points xy (..., 2) along and across the axes of poses (..., 3), by broadcasting."""
    delta = xy - pose_xyyaw[..., :2]
    cos, sin = np.cos(pose_xyyaw[..., 2]), np.sin(pose_xyyaw[..., 2])
    return cos * delta[..., 0] + sin * delta[..., 1], cos * delta[..., 1] - sin * delta[..., 0]


def rectangles_overlap(pose_a: Array, half_a: Array, pose_b: Array, half_b: Array) -> BoolArray:
    """Separating-axis test of rectangles, by broadcasting over leading dimensions.

    Args:
        pose_a: (..., 3) x, y, yaw of the centres.
        half_a: (..., 2) half length and half width.
        pose_b: As `pose_a`.
        half_b: As `half_a`.
    """
    delta = pose_b[..., :2] - pose_a[..., :2]
    turn = pose_b[..., 2] - pose_a[..., 2]
    cos, sin = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    overlap = np.ones(delta.shape[:-1], dtype=bool)
    for pose, own, other in ((pose_a, half_a, half_b), (pose_b, half_b, half_a)):
        c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
        along = np.abs(c * delta[..., 0] + s * delta[..., 1])
        across = np.abs(c * delta[..., 1] - s * delta[..., 0])
        overlap &= along <= own[..., 0] + cos * other[..., 0] + sin * other[..., 1]
        overlap &= across <= own[..., 1] + sin * other[..., 0] + cos * other[..., 1]
    return overlap


def segment_crosses(start_xy: Array, end_xy: Array, poses_n3: Array, halves_n2: Array) -> BoolArray:
    """Which of N rectangles the segment from `start_xy` to `end_xy` passes through, (N,)."""
    along_a, across_a = to_local(start_xy, poses_n3)
    along_b, across_b = to_local(end_xy, poses_n3)
    enter, leave = np.zeros(len(poses_n3)), np.ones(len(poses_n3))
    for a, b, half in ((along_a, along_b, halves_n2[:, 0]), (across_a, across_b, halves_n2[:, 1])):
        step = np.where(np.abs(b - a) < 1e-9, 1e-9, b - a)
        first, second = (-half - a) / step, (half - a) / step
        enter = np.maximum(enter, np.minimum(first, second))
        leave = np.minimum(leave, np.maximum(first, second))
    return enter < leave


def turned(poses_xyyaw: Array, angle_rad: float) -> Array:
    """Poses (..., 3) with the angle added to their heading."""
    return np.asarray(poses_xyyaw + np.array([0.0, 0.0, angle_rad]))


def wrap_angle(angle_rad: Array) -> Array:
    """Angle brought to [-pi, pi)."""
    return (angle_rad + np.pi) % (2 * np.pi) - np.pi
