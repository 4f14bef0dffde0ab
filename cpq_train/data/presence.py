"""Which scenes have all their clouds on disk: a root may be downloaded in part."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpq_train.data.index import NuScenesIndex
from cpq_train.data.sweeps import previous_frames


def scenes_without_files(index: NuScenesIndex, rows: NDArray[np.int64], num_sweeps: int) -> dict[str, str]:
    """Name of each scene of which a cloud is missing, and the first such file, relative to the root.

    Args:
        index: the data set.
        rows: (S,) the samples whose clouds are looked for.
        num_sweeps: of each sample, the key frame included.
    """
    listed: dict[str, set[str]] = {}
    missing: dict[str, str] = {}
    for row in rows.tolist():
        name = index.scene_name(row)
        if name in missing:
            continue
        frames = (int(index.sample_frames[row]), *previous_frames(index, row, num_sweeps))
        paths = (str(index.frame_paths[frame], "utf-8") for frame in dict.fromkeys(frames))
        absent = next((path for path in paths if not _is_there(index.root, path, listed)), None)
        if absent is not None:
            missing[name] = absent
    return missing


def _is_there(root: Path, path: str, listed: dict[str, set[str]]) -> bool:
    """Whether a file exists, by the listing of its folder: one pass for thousands of files."""
    folder, _, name = path.rpartition("/")
    if folder not in listed:
        try:
            listed[folder] = set(os.listdir(root / folder))
        except OSError:
            listed[folder] = set()
    return name in listed[folder]
