"""Runs an exported detector where there is Python, numpy and onnxruntime, and nothing of this package.

Copy this file beside the engine file and its JSON file:

    python deployed_detector.py FILE.onnx --clouds a.bin b.bin --output boxes.json
    python deployed_detector.py FILE.onnx --sweeps sweeps.json

A sweeps file is a list, key frame first, of {"file", "matrix" (4x4 by rows, from the sweep's LiDAR frame to
the key frame's), "time_lag_s"}; the key frame has "file" alone. Paths are relative to the sweeps file.

The rules are those of `cpq_train predict`, and voxels have the same bits. Boxes and scores may differ by
rounding, so that scores which are that close may change places.

Letters: P points, V voxels, T points per voxel, C columns or classes, H W map, N boxes, Q pairs of boxes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

SCHEMA, TARGETS = 1, ("portable", "portable-fast")
BRANCHES = ("center", "center_z", "dim", "rot", "vel", "hm")
MAX_BOXES = 500
"""Boxes of a cloud, the best ones: the official nuScenes server takes no more."""
_NUM_COLUMNS, _POINT_BYTES, _EGO_HALF_WIDTH_M, _TINY_M = 5, 20, 1.0, 1e-9

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Head = Mapping[str, Float32]
"""Raw outputs of a class group by branch, each (1, channels, H, W)."""
Sweep = tuple[Float32, Float64, float]
"""Points (P, 5) as in a file, (4, 4) matrix to the key frame's LiDAR frame, seconds to the key frame."""
_float32 = partial(np.asarray, dtype=np.float32)


class DeploymentError(Exception):
    """A file that cannot be used."""

    def __init__(self, what: str, seen: object, accepted: object) -> None:
        super().__init__(f"{what}: {seen}; accepted: {accepted}")


class Detections(NamedTuple):
    """Boxes of one cloud, by head and falling score: (N, 9), (N,) and class ids (N,).

    Columns of boxes: x, y, z, length, width, height (m), yaw (rad), velocity x, y (m/s).
    """

    boxes: Float32
    scores: Float32
    labels: NDArray[np.int64]

    def part(self, rows: Any) -> Detections:
        """Some of the boxes, by whatever indexes an array."""
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows])


class DeployedDetector:
    """An engine file with what happens before and behind it; `engine` says which file.

    Args:
        engine_file: the ONNX file; its JSON file lies beside it.
        num_threads: of onnxruntime; None for its own choice.

    Raises:
        DeploymentError: one of the files is missing, damaged, or of another kind.
    """

    def __init__(self, engine_file: Path, num_threads: int | None = None) -> None:
        content, sidecar = _read_engine(engine_file)
        with _naming(f"settings in {engine_file.with_suffix('.json')}"):
            self._read_settings(sidecar)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, num_threads or 0  # 3: errors alone
        with _naming(f"engine file {engine_file} with onnxruntime {onnxruntime.__version__}"):
            self._session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        self.engine = {**sidecar["file"], "onnxruntime": onnxruntime.__version__}

    def _read_settings(self, sidecar: Mapping[str, Any]) -> None:
        data, network, post = sidecar["data"], sidecar["network"], sidecar["post_processing"]
        low, high = np.reshape(data["point_cloud_range"], (2, 3))
        self._num_cells = np.round((high - low) / data["voxel_size"]).astype(np.int64)
        self._low, self._size = _float32(low), _float32(data["voxel_size"])
        self._max_points, self._max_voxels = data["max_points_per_voxel"], data["max_num_voxels_eval"]
        self.class_names: list[str] = sidecar["class_names"]
        self._groups = [[self.class_names.index(name) for name in group] for group in network["class_groups"]]
        self._stride = np.float32(sidecar["head_map"]["stride"])
        self._origin_m = _float32(network["point_cloud_range"][:2])
        self._cell_m = _float32(network["voxel_size"][:2])
        self._score_threshold, self._iou_threshold = np.float32(post["score_threshold"]), post["nms_iou"]
        self._center_low, self._center_high = _float32(post["center_range"]).reshape(2, 3)
        limits = ("max_objects_per_head", "nms_pre", "nms_post")
        self._max_cells, self._nms_pre, self._nms_post = (post[name] for name in limits)

    def __call__(self, points: Float32) -> Detections:
        """Finds boxes in (P, 5) x, y, z (m), intensity (0 to 255), time lag (s) in the LiDAR frame.

        Raises:
            DeploymentError: the points have another shape, or hold NaN or infinite values.
        """
        _check_points(points, "cloud")
        found = self.decode(self.heads(*self.voxelize(_float32(points))))
        return found.part(np.sort(np.argsort(-found.scores, kind="stable")[:MAX_BOXES]))

    def records(self, found: Detections) -> list[dict[str, Any]]:
        """Boxes as an output file has them: "box", "score" and "name" of each."""
        names = [self.class_names[label] for label in found.labels]
        rows = zip(found.boxes.tolist(), found.scores.tolist(), names, strict=True)
        return [{"box": box, "score": score, "name": name} for box, score, name in rows]

    def voxelize(self, points: Float32) -> tuple[Float32, NDArray[np.int32]]:
        """Means (V, 5) of the first T points (P, 5) of each voxel; cells (V, 3) z, y, x, by first point."""
        steps = np.floor((points[:, :3] - self._low) / self._size)
        rows = np.flatnonzero(((steps >= 0) & (steps < self._num_cells)).all(axis=1))
        xyz = steps[rows].astype(np.int64)
        cells = (xyz[:, 2] * self._num_cells[1] + xyz[:, 1]) * self._num_cells[0] + xyz[:, 0]
        by_cell = np.argsort(cells, kind="stable")
        starts = np.flatnonzero(np.diff(cells[by_cell], prepend=-1))
        by_first = np.argsort(by_cell[starts])[: self._max_voxels]
        counts = np.minimum(np.diff(starts, append=len(rows))[by_first], self._max_points)
        voxel = np.repeat(np.arange(len(counts)), counts)
        slot = np.arange(len(voxel)) - np.repeat(np.cumsum(counts) - counts, counts)
        slots_TV5 = np.zeros((self._max_points, len(counts), _NUM_COLUMNS), dtype=np.float32)
        slots_TV5[slot, voxel] = points[rows[by_cell[starts[by_first[voxel]] + slot]]]
        means = _sum_like_torch(slots_TV5) / counts[:, None].astype(np.float32)
        return means, xyz[by_cell[starts[by_first]], ::-1].astype(np.int32)

    def heads(self, features: Float32, coords: NDArray[np.int32]) -> list[Head]:
        """Runs the network on voxels as `voxelize` gives them."""
        inputs = {"voxel_features": features, "voxel_coords": coords}
        names = (output.name for output in self._session.get_outputs())
        outputs = dict(zip(names, self._session.run(None, inputs), strict=True))
        heads = range(len(self._groups))
        return [{branch: outputs[f"head{head}.{branch}"] for branch in BRANCHES} for head in heads]

    def decode(self, heads: Sequence[Head]) -> Detections:
        """Boxes from raw outputs: the best cells, filtered, and suppressed inside each head."""
        with np.errstate(all="ignore"):  # a network may say anything
            found = list(map(self._of_head, heads, self._groups))
        boxes, scores, labels = (np.concatenate(column) for column in zip(*found, strict=True))
        return Detections(boxes, scores, labels)

    def _of_head(self, head: Head, class_ids: Sequence[int]) -> Detections:
        odds_CHW = _float32(np.exp(-head["hm"][0].astype(np.float64)))
        scores_CHW = np.float32(1) / (np.float32(1) + odds_CHW)  # each step rounded, as torch does it
        cells = np.nonzero(scores_CHW > self._score_threshold)
        order = np.argsort(-scores_CHW[cells], kind="stable")[: self._max_cells]
        channel, row, column = (index[order] for index in cells)
        code_N10 = np.concatenate([head[name][0][:, row, column] for name in BRANCHES[:-1]]).T
        xy = (_float32(np.stack([column, row], axis=1)) + code_N10[:, :2]) * self._stride * self._cell_m
        exact = code_N10.astype(np.float64)
        size, yaw = np.exp(exact[:, 3:6]), np.arctan2(exact[:, 7:8], exact[:, 6:7])
        parts = (xy + self._origin_m, code_N10[:, 2:3], size, yaw, code_N10[:, 8:])
        boxes_N9 = _float32(np.concatenate(parts, axis=1))
        xyz = boxes_N9[:, :3]
        is_inside = ((xyz >= self._center_low) & (xyz <= self._center_high)).all(axis=1)
        found = Detections(boxes_N9, scores_CHW[channel, row, column], np.array(class_ids)[channel])
        return self._suppress(found.part(is_inside))

    def _suppress(self, found: Detections) -> Detections:
        """Greedy NMS of boxes sorted by falling score."""
        found = found.part(slice(self._nms_pre))
        overlaps_NN = _overlaps(found.boxes.astype(np.float64), self._iou_threshold)
        is_kept = np.ones(len(overlaps_NN), dtype=np.bool_)
        for row, overlaps_N in enumerate(overlaps_NN):
            is_kept &= ~(overlaps_N & is_kept[row])
        return found.part(np.flatnonzero(is_kept)[: self._nms_post])


def read_cloud(path: Path) -> Float32:
    """Reads a file of float32 x, y, z, intensity, ring as (P, 5) x, y, z, intensity, 0.

    Raises:
        DeploymentError: the file is missing, truncated or holds NaN or infinite values.
    """
    with _naming(f"cloud {path}"):
        content = path.read_bytes()
    if len(content) == 0 or len(content) % _POINT_BYTES:
        raise DeploymentError(f"cloud {path}", f"{len(content)} bytes", f"a multiple of {_POINT_BYTES}")
    points = np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(-1, _NUM_COLUMNS)
    _check_points(points, f"cloud {path}")
    points[:, 4] = 0.0
    return points


def join_sweeps(sweeps: Sequence[Sweep]) -> Float32:
    """Points (P, 5) of all sweeps in the key frame's LiDAR frame: x, y, z, intensity, time lag.

    The key frame is the first and stays as it is; the others lose the returns from the vehicle.
    """
    joined = [sweeps[0][0].T * _float32([[1], [1], [1], [1], [0]])]
    for points, to_key_frame, time_lag_s in sweeps[1:]:
        is_ego = (np.abs(points[:, :2]) < _EGO_HALF_WIDTH_M).all(axis=1)
        columns = np.ascontiguousarray(points[~is_ego].T)
        columns[:3] = to_key_frame[:3, :3] @ columns[:3] + to_key_frame[:3, 3:]
        columns[4] = time_lag_s
        joined.append(columns)
    columns = np.concatenate(joined, axis=1)
    return columns.T


def read_sweeps(path: Path) -> list[Sweep]:
    """Reads the sweeps that a JSON file names; the head of this module describes it.

    Raises:
        DeploymentError: the file is no such list, or a cloud cannot be used.
    """
    with _naming(f"sweeps file {path}"):
        entries = json.loads(path.read_bytes())
        entries[0] = {"matrix": np.eye(4), "time_lag_s": 0, **entries[0]}
        files = [path.parent / entry["file"] for entry in entries]
        matrices = np.array([entry["matrix"] for entry in entries], dtype=np.float64).reshape(-1, 4, 4)
        time_lags_s = [float(entry["time_lag_s"]) for entry in entries]
    is_bad = ~np.isclose(matrices[:, 3], np.eye(4)[3]).all(axis=1)
    is_bad[0] |= not np.allclose(matrices[0], np.eye(4))
    if is_bad.any():
        what = f"sweeps file {path}, matrix of sweep {is_bad.argmax()}"
        accepted = "none for the key frame, which is the first; 0 0 0 1 as the last row of the others"
        raise DeploymentError(what, matrices[is_bad.argmax()].tolist(), accepted)
    return list(zip(map(read_cloud, files), matrices, time_lags_s, strict=True))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns what goes wrong with a file into an error that names it."""
    try:
        yield
    except OSError as error:
        raise DeploymentError(what, error.strerror, "a readable file") from error
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise DeploymentError(what, repr(error), "what export wrote, and the help describes") from error


def _read_engine(path: Path) -> tuple[bytes, dict[str, Any]]:
    """An engine file and its sidecar, which belong together."""
    where = path.with_suffix(".json")
    with _naming(f"engine file {path}"):
        content = path.read_bytes()
    with _naming(f"{where}, which belongs to {path.name},"):
        sidecar = json.loads(where.read_bytes())
        checks = {"schema": (sidecar["schema"], (SCHEMA,)), "target": (sidecar["target"], TARGETS)}
        checks[f"SHA-256 of {path}"] = (hashlib.sha256(content).hexdigest(), (sidecar["file"]["sha256"],))
    for what, (seen, accepted) in checks.items():
        if seen not in accepted:
            raise DeploymentError(f"{where}, {what}", repr(seen), " or ".join(map(repr, accepted)))
    return content, sidecar


def _check_points(points: Float32, what: str) -> None:
    if points.ndim != 2 or points.shape[1] != _NUM_COLUMNS:
        raise DeploymentError(what, f"shape {points.shape}", f"(points, {_NUM_COLUMNS})")
    is_bad = ~np.isfinite(points).all(axis=1)
    if is_bad.any():
        seen = f"NaN or infinite values in {is_bad.sum()} of {len(points)} points, first in {is_bad.argmax()}"
        raise DeploymentError(what, seen, "finite numbers")


def _sum_like_torch(slots_TVC: Float32) -> Float32:
    """Sums (V, C) with the bits of torch on x86, which adds columns four at a time, slot after slot.

    Columns behind the last four it adds as four sums, of every fourth slot each.
    """
    num_fours, num_columns = len(slots_TVC) // 4 * 4, slots_TVC.shape[2] // 4 * 4
    rest = slots_TVC[:, :, num_columns:]
    quarters = [_add_up(rest[start:num_fours:4]) for start in range(4)]
    quarters[0] = reduce(np.add, rest[num_fours:], quarters[0])
    return np.concatenate([_add_up(slots_TVC[:, :, :num_columns]), reduce(np.add, quarters)], axis=1)


def _add_up(slots_TVC: Float32) -> Float32:
    """Sums (V, C) of 16 slots each, in order, then of those sums; torch's way for fewer than 272 slots."""
    parts = (reduce(np.add, slots_TVC[start : start + 16]) for start in range(0, len(slots_TVC), 16))
    return reduce(np.add, parts, np.zeros(slots_TVC.shape[1:], dtype=np.float32))


def _overlaps(boxes_N9: Float64, threshold: float) -> NDArray[np.bool_]:
    """Whether a box (row) and one behind it (column) have a greater IoU from above than this, (N, N)."""
    x, y, _, length, width = boxes_N9.T[:5]
    area, radius = length * width, np.hypot(length, width) / 2
    dx, dy, reach = x[:, None] - x, y[:, None] - y, radius[:, None] + radius
    possible = np.minimum(area[:, None], area) > threshold * np.maximum(area[:, None], area)
    overlaps_NN = np.triu(possible & (dx * dx + dy * dy < reach * reach), 1)
    first, second = np.nonzero(overlaps_NN)
    shared = _shared_area(boxes_N9[first].T, boxes_N9[second].T)
    union = np.maximum(area[first] + area[second] - shared, _TINY_M**2)
    overlaps_NN[first, second] = shared / union > threshold
    return overlaps_NN


def _shared_area(frames_9Q: Float64, boxes_9Q: Float64) -> Float64:
    """Area that rectangles share: minus the integral along the outline of one, clamped to the other."""
    (dx, dy), turn = boxes_9Q[:2] - frames_9Q[:2], boxes_9Q[6] - frames_9Q[6]
    corners = np.outer([1, -1, -1, 1], boxes_9Q[3]) + 1j * np.outer([1, 1, -1, -1], boxes_9Q[4])
    outline = (dx + 1j * dy) * np.exp(-1j * frames_9Q[6]) + corners / 2 * np.exp(1j * turn)
    x, y, (half_length, limit) = outline.real, outline.imag, frames_9Q[3:5] / 2
    next_x = np.roll(x, -1, axis=0)
    run, rise = next_x - x, np.roll(y, -1, axis=0) - y
    slope = np.where(np.abs(run) > _TINY_M, rise / run, 0.0)  # an upright edge spans no area
    start, end = np.clip(x, -half_length, half_length), np.clip(next_x, -half_length, half_length)
    ends = y + slope * (start - x), y + slope * (end - x)
    low, high = np.minimum(*ends), np.maximum(*ends)
    inner_low, inner_high, span = np.clip(low, -limit, limit), np.clip(high, -limit, limit), high - low
    middle = (inner_low + inner_high) / 2
    below, above = np.clip(-limit - low, 0, span), np.clip(high - limit, 0, span)
    mean = ((above - below) * limit + (inner_high - inner_low) * middle) / span
    height = np.where(span > _TINY_M, mean, middle)
    area: Float64 = -np.minimum(((end - start) * height).sum(axis=0), 0)
    return area


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; its exit code is 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description="Finds boxes in LiDAR clouds with an exported detector.")
    parser.add_argument("engine_file", type=Path, metavar="FILE.onnx", help="its .json lies beside it")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--clouds", type=Path, nargs="+", help="files of one sweep each")
    inputs.add_argument("--sweeps", type=Path, help="JSON list of the sweeps of one cloud, key frame first")
    parser.add_argument("--output", type=Path, help="JSON file to write; without it a table is printed")
    parser.add_argument("--num_threads", type=int, help="of onnxruntime")
    options = parser.parse_args(arguments)
    results = {}
    try:
        detector = DeployedDetector(options.engine_file, options.num_threads)
        for path in options.clouds or [options.sweeps]:
            found = detector(read_cloud(path) if options.clouds else join_sweeps(read_sweeps(path)))
            results[str(path)] = detector.records(found)
        if options.output is not None:
            document = {"schema": SCHEMA, "engine": detector.engine, "results": results}
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    except (DeploymentError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for cloud, records in results.items() if options.output is None else ():
        print(f"{cloud}: {len(records)} boxes; x, y, z, length, width, height (m), yaw (rad), vx, vy (m/s)")
        for name, record in ((ascii(one["name"])[1:-1], one) for one in records):
            print(f"{name:20} {record['score']:.3f}", *(f"{value:7.2f}" for value in record["box"]))


if __name__ == "__main__":
    main()
