"""Runs an exported detector where there is Python, numpy and onnxruntime, and nothing of this package.

Copy this file beside the engine file and its JSON file:

    python deployed_detector.py FILE.onnx --clouds a.bin b.bin --output boxes.json
    python deployed_detector.py FILE.onnx --sweeps sweeps.json

A sweeps file is a list, key frame first, of {"file", "matrix" (4x4 by rows, from the sweep's LiDAR frame to
the key frame's), "time_lag_s"}; the key frame has "file" alone. Paths are relative to the sweeps file. The
rules are those of `cpq_train predict`: voxels have the same bits, boxes and scores differ by rounding.

Letters: P points, F features, V voxels, T points per voxel, C columns or classes, H W map, N Q boxes, pairs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
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
MAX_BOXES = 500  # of a cloud, the best ones: the official nuScenes server takes no more
NUSCENES = ("x", "y", "z", "intensity", "ring")
COLUMN = re.compile(r"([A-Za-z_]\w*)(?::(float(?:16|32|64)|u?int(?:8|16|32)))?", re.ASCII)
BOUNDS = dict.fromkeys("xyz", (-1e3, 1e3)) | {"intensity": (0, 256), "ring": (0, 255), "time_lag": (-60, 60)}
_EGO_HALF_WIDTH_M, _TINY_M = 1.0, 1e-9

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Head = Mapping[str, Float32]  # raw outputs of a class group by branch, each (1, channels, H, W)
Sweep = tuple[Float32, Float64, float]  # points of `read_cloud`, 4x4 matrix and seconds to the key frame
_float32 = partial(np.asarray, dtype=np.float32)


class DeploymentError(Exception):
    """A file that cannot be used."""


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
        _fields(self.how[0])  # refuses what is none
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
        self.how = data.get("point_columns", NUSCENES), float(data.get("intensity_scale", 1.0))
        self._max_points, self._max_voxels = data["max_points_per_voxel"], data["max_num_voxels_eval"]
        self.class_names: list[str] = sidecar["class_names"]
        self._groups = [[self.class_names.index(name) for name in group] for group in network["class_groups"]]
        self._stride, self._width = np.float32(sidecar["head_map"]["stride"]), network["num_point_features"]
        self._origin_m, self._cell_m = (_float32(network[k][:2]) for k in ("point_cloud_range", "voxel_size"))
        self._score_threshold, self._iou_threshold = np.float32(post["score_threshold"]), post["nms_iou"]
        self._center_low, self._center_high = _float32(post["center_range"]).reshape(2, 3)
        limits = ("max_objects_per_head", "nms_pre", "nms_post")
        self._max_cells, self._nms_pre, self._nms_post = (post[name] for name in limits)

    def __call__(self, points: Float32) -> Detections:
        """Finds boxes in points (P, F) as of `read_cloud` or `join_sweeps`; errors as of `read_cloud`."""
        _check_points(points, "cloud", self._width)
        found = self.decode(self.heads(*self.voxelize(_float32(points))))
        return found.part(np.sort(np.argsort(-found.scores, kind="stable")[:MAX_BOXES]))

    def records(self, found: Detections) -> list[dict[str, Any]]:
        """Boxes as an output file has them: "box", "score" and "name" of each."""
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        return [{"box": box, "score": score, "name": self.class_names[label]} for box, score, label in rows]

    def voxelize(self, points: Float32) -> tuple[Float32, NDArray[np.int32]]:
        """Means (V, F) of the first T points (P, F) of each voxel; cells (V, 3) z, y, x, by first point."""
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
        slots_TVF = np.zeros((self._max_points, len(counts), points.shape[1]), dtype=np.float32)
        slots_TVF[slot, voxel] = points[rows[by_cell[starts[by_first[voxel]] + slot]]]
        means = _sum_like_torch(slots_TVF) / counts[:, None].astype(np.float32)
        return means, xyz[by_cell[starts[by_first]], ::-1].astype(np.int32)

    def heads(self, features: Float32, coords: NDArray[np.int32]) -> list[Head]:
        """Runs the network on voxels as `voxelize` gives them."""
        names = [f"head{head}.{branch}" for head in range(len(self._groups)) for branch in BRANCHES]
        outputs = iter(self._session.run(names, {"voxel_features": features, "voxel_coords": coords}))
        return [{branch: next(outputs) for branch in BRANCHES} for _ in self._groups]

    def decode(self, heads: Sequence[Head]) -> Detections:
        """Boxes from raw outputs: the best cells, filtered, and suppressed inside each head."""
        with np.errstate(all="ignore"):  # a network may say anything
            found = list(map(self._of_head, heads, self._groups))
        return Detections(*map(np.concatenate, zip(*found, strict=True)))

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
        is_inside = (self._center_low <= boxes_N9[:, :3]) & (boxes_N9[:, :3] <= self._center_high)
        found = Detections(boxes_N9, scores_CHW[channel, row, column], np.array(class_ids)[channel])
        return self._suppress(found.part(is_inside.all(axis=1)))

    def _suppress(self, found: Detections) -> Detections:
        """Greedy NMS of boxes sorted by falling score."""
        found = found.part(slice(self._nms_pre))
        overlaps_NN = _overlaps(found.boxes.astype(np.float64), self._iou_threshold)
        is_kept = np.ones(len(overlaps_NN), dtype=np.bool_)
        for row, overlaps_N in enumerate(overlaps_NN):
            is_kept &= ~(overlaps_N & is_kept[row])
        return found.part(np.flatnonzero(is_kept)[: self._nms_post])


def read_cloud(path: Path, columns: Sequence[str] = NUSCENES, intensity_scale: float = 1.0) -> Float32:
    """Reads a .npy file, or raw columns, as (P, F) x, y, z (m), others but ring and `_...`, time lag (s).

    Raises:
        DeploymentError: the file is missing, truncated, PCD, of other columns, or holds NaN or infinity.
    """
    what, is_npy, fields = f"cloud {path}", path.suffix.lower() == ".npy", _fields(columns)
    _expect(path.suffix.lower() != ".pcd", what, "a PCD file", ".npy, and raw columns in other files")
    with _naming(what):
        table = np.load(path) if is_npy else np.fromfile(path, np.uint8)
    record, of_numbers = np.dtype(list(fields.items())), table.dtype.kind in "fiu"
    fits = of_numbers and table.shape[1:] == (len(fields),) if is_npy else len(table) % record.itemsize == 0
    accepted = f"(points, {len(fields)}) of numbers" if is_npy else f"bytes, a multiple of {record.itemsize}"
    _expect(fits and len(table), what, f"{table.dtype} of shape {table.shape}", accepted)
    found = dict(zip(fields, table.T, strict=True)) if is_npy else table.view(record)
    others = [name for name in fields if name not in (*"xyz", "ring", "time_lag") and name[0] != "_"]
    order, none = [*"xyz", *others, "time_lag", "ring"], np.zeros(len(found["x"]))
    points: Float32 = np.stack([_float32(found[name] if name in fields else none) for name in order], 1)
    points *= _float32([intensity_scale if name == "intensity" else 1 for name in order])
    _check_points(points[:, :-1], what, len(order) - 1)
    low, high = np.transpose([BOUNDS.get(name, (-np.inf, np.inf)) for name in order])
    is_odd = (points < low) | (points > high) | ((np.array(order) == "ring") & (points != np.round(points)))
    share, name = max(zip(is_odd.mean(axis=0).tolist(), order, strict=True))  # single odd ones are no error
    _expect(share <= 0.02, what, f"{name} of {columns} is odd in {share:.0%} of points", BOUNDS.get(name))
    return points[:, :-1]


def join_sweeps(sweeps: Sequence[Sweep], columns: Sequence[str] = NUSCENES) -> Float32:
    """Points (P, F) of sweeps in the frame of the first; the others lose the returns from the vehicle."""
    joined, adds = [], "time_lag" in _fields(columns)
    for number, (points, to_key_frame, time_lag_s) in enumerate(sweeps):
        is_ego = (np.abs(points[:, :2]) < _EGO_HALF_WIDTH_M).all(axis=1) & (number > 0)
        table = np.ascontiguousarray(points[~is_ego].T)
        if number:
            table[:3] = to_key_frame[:3, :3] @ table[:3] + to_key_frame[:3, 3:]
        table[-1] = table[-1] * adds + time_lag_s
        joined.append(table)
    return _float32(np.concatenate(joined, axis=1).T)


def read_sweeps(path: Path, *how: Any) -> list[Sweep]:
    """Reads the sweeps of a JSON file, see the head of this module; `how` and errors as of `read_cloud`."""
    with _naming(f"sweeps file {path}"):
        entries = json.loads(path.read_bytes())
        entries[0] = {"matrix": np.eye(4), "time_lag_s": 0, **entries[0]}
        files = [path.parent / entry["file"] for entry in entries]
        matrices = np.array([entry["matrix"] for entry in entries], dtype=np.float64).reshape(-1, 4, 4)
        time_lags_s = [float(entry["time_lag_s"]) for entry in entries]
    accepted = "none for the key frame, which is the first; 0 0 0 1 as the last row of the others"
    for number, matrix in enumerate(matrices):
        rows = slice(3 if number else 0, 4)  # all four of the key frame's
        where = f"sweeps file {path}, matrix of sweep {number}"
        _expect(np.allclose(matrix[rows], np.eye(4)[rows]), where, matrix.tolist(), accepted)
    return list(zip((read_cloud(file, *how) for file in files), matrices, time_lags_s, strict=True))


def _expect(is_so: Any, what: str, seen: object, accepted: object) -> None:
    if not is_so:
        raise DeploymentError(f"{what}: {seen}; accepted: {accepted}")


@contextmanager
def _naming(what: str) -> Iterator[None]:  # turns what goes wrong with a file into an error that names it
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no base of their own
        seen = getattr(error, "strerror", None) or repr(error)
        raise DeploymentError(f"{what}: {seen}; accepted: a readable file, as written by export") from error


def _fields(columns: Any) -> dict[str, np.dtype[Any]]:
    """The columns of a raw file by name, in order."""
    is_list = isinstance(columns, list | tuple) and all(isinstance(one, str) for one in columns)
    found = [COLUMN.fullmatch(one) for one in columns] if is_list else [None]
    fields = {one[1]: np.dtype(one[2] or "f4").newbyteorder("<") for one in found if one}
    fits = len(fields) == len(found) and {*"xyz"} <= fields.keys()
    _expect(fits, "data.point_columns", f"{columns!r:.200}", "a list of x, y, z, others; name or name:dtype")
    return fields


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
        _expect(seen in accepted, f"{where}, {what}", repr(seen), " or ".join(map(repr, accepted)))
    return content, sidecar


def _check_points(points: Float32, what: str, width: int) -> None:
    _expect(points.shape[1:] == (width,), what, f"shape {points.shape}", f"(points, {width})")
    is_bad = ~np.isfinite(points).all(axis=1)
    if is_bad.any():
        seen = f"NaN or infinite values in {is_bad.sum()} of {len(points)} points, first in {is_bad.argmax()}"
        raise DeploymentError(f"{what}: {seen}; accepted: finite numbers")


def _sum_like_torch(slots_TVC: Float32) -> Float32:
    """Sums (V, C) as torch on x86: 4 (of 8 or more, 32) columns slot by slot, others by every fourth slot."""
    num_fours, at_once = len(slots_TVC) // 4 * 4, 4 if slots_TVC.shape[2] < 8 else 32
    num_columns = slots_TVC.shape[2] // at_once * at_once
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
    return np.asarray(-np.minimum(((end - start) * height).sum(axis=0), 0), dtype=np.float64)


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
            sweeps = read_sweeps(path, *detector.how) if options.sweeps else ()
            points = join_sweeps(sweeps, detector.how[0]) if sweeps else read_cloud(path, *detector.how)
            results[str(path)] = detector.records(detector(points))
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
