"""A simulated root as a team of its own would have it: other columns, other file types."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]
Write = Callable[[Path, NDArray[Any], Sequence[str]], None]

FOUR = ("x", "y", "z", "intensity")
SIX = ("x", "y", "z", "intensity", "ring", "elongation")


def nuscenes_points(path: Path) -> Points:
    """(P, 5) of a file as nuScenes has it."""
    return np.fromfile(path, np.float32).reshape(-1, 5)


def own_columns(points: Points, columns: Sequence[str]) -> Points:
    """(P, C) of nuScenes' columns; one that nuScenes lacks follows from where a point lies."""
    known = dict(zip(("x", "y", "z", "intensity", "ring"), points.T, strict=True))
    known["elongation"] = (np.abs(points[:, 0]) / 100).astype(np.float32)
    return np.stack([known[name] for name in columns], axis=1)


def write_bin(path: Path, table: NDArray[Any], names: Sequence[str]) -> None:
    np.ascontiguousarray(table).tofile(path)


def write_npy(path: Path, table: NDArray[Any], names: Sequence[str]) -> None:
    np.save(path, table)


def pcd(table: NDArray[Any], names: Sequence[str], data: str = "binary", pack: Any = None) -> bytes:
    """A PCD file of float32 fields, as the Point Cloud Library writes it."""
    width = len(names)
    header = (
        f"# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS {' '.join(names)}\n"
        f"SIZE {' '.join(['4'] * width)}\nTYPE {' '.join(['F'] * width)}\nCOUNT {' '.join(['1'] * width)}\n"
        f"WIDTH {len(table)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(table)}\nDATA {data}\n"
    ).encode()
    if data == "ascii":
        return header + "\n".join(" ".join(f"{v:.9g}" for v in row) for row in table.tolist()).encode()
    if data == "binary":
        return header + np.ascontiguousarray(table, dtype="<f4").tobytes()
    raw = np.ascontiguousarray(table.T, dtype="<f4").tobytes()
    packed = (pack or lzf)(raw)
    return header + struct.pack("<II", len(packed), len(raw)) + packed


def lzf(raw: bytes) -> bytes:
    """Packs by LZF: runs that were seen before, and the bytes between them."""
    out, plain, at = bytearray(), bytearray(), 0
    seen: dict[bytes, int] = {}

    def flush() -> None:
        for start in range(0, len(plain), 32):
            piece = plain[start : start + 32]
            out.append(len(piece) - 1)
            out.extend(piece)
        plain.clear()

    while at < len(raw):
        key = raw[at : at + 3]
        before = seen.get(key, -1) if len(key) == 3 else -1
        seen[key] = at
        distance, length = at - before - 1, 3
        if before < 0 or distance >= 8192:
            plain.append(raw[at])
            at += 1
            continue
        while length < 264 and at + length < len(raw) and raw[before + length] == raw[at + length]:
            length += 1
        flush()
        short = length - 2
        out.append((min(short, 7) << 5) | (distance >> 8))
        if short >= 7:
            out.append(short - 7)
        out.append(distance & 255)
        at += length
    flush()
    return bytes(out)


def write_pcd(path: Path, table: NDArray[Any], names: Sequence[str]) -> None:
    path.write_bytes(pcd(table, names))


def rewritten(
    source: Path,
    root: Path,
    columns: Sequence[str] = FOUR,
    ending: str = ".bin",
    write: Write = write_bin,
    change: Callable[[Points], NDArray[Any]] = lambda points: points,
) -> Path:
    """A copy of a root whose clouds have other columns, another ending and another content.

    Args:
        source: the simulated root.
        root: the copy, which is made.
        columns: names of the columns of a file.
        ending: of the files; the tables name them by it.
        write: writes a table (P, C) as a file.
        change: is applied to a table (P, C) before.
    """
    shutil.copytree(source, root, ignore=shutil.ignore_patterns(".cpq_train", "LIDAR_TOP"))
    for cloud in sorted(source.glob("s*/LIDAR_TOP/*.pcd.bin")):
        place = root / cloud.relative_to(source).parent
        place.mkdir(parents=True, exist_ok=True)
        table = change(own_columns(nuscenes_points(cloud), columns))
        write(place / (cloud.name.removesuffix(".pcd.bin") + ending), table, columns)
    for tables in root.glob("v1.0-*/sample_data.json"):
        tables.write_text(tables.read_text().replace(".pcd.bin", ending))
    return root


def four_columns(source: Path, root: Path) -> Path:
    """Raw float32 x, y, z, intensity."""
    return rewritten(source, root)


def six_columns_in_pcd(source: Path, root: Path) -> Path:
    """Binary PCD files of x, y, z, intensity, ring and a column of the team's own."""
    return rewritten(source, root, SIX, ".pcd", write_pcd)
