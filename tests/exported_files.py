"""Old checkpoints that say with what data settings they were made, and what `export` makes of them."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from old_files import CHECKPOINTS

from cpq_train.export.sidecar import sidecar_path
from cpq_train.verbs.cli import main

DATA = {
    "num_sweeps": 2,
    "voxel_size": (0.64, 0.64, 0.32),
    "point_cloud_range": (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    "max_points_per_voxel": 10,
    "max_num_voxels_train": 60000,
    "max_num_voxels_eval": 60000,
}
"""Those that the old runs had."""


def stating(folder: Path, name: str, **data: Any) -> Path:
    """One of the old checkpoints with its data settings, or others."""
    folder.mkdir(parents=True, exist_ok=True)
    content = torch.load(CHECKPOINTS[name], weights_only=True)
    torch.save({**content, "data": {**DATA, **data}}, folder / f"{name}.ckpt")
    return folder / f"{name}.ckpt"


def exported(checkpoint: Path, folder: Path) -> Path:
    """The deployment file of a checkpoint, by the command line."""
    main(["export", str(checkpoint), "--output", str(folder / f"{checkpoint.stem}.onnx")])
    return folder / f"{checkpoint.stem}.onnx"


def forge(engine: Path, content: bytes) -> None:
    """Put something else in a deployment file's place, with the hash that its sidecar states."""
    engine.write_bytes(content)
    document = json.loads(sidecar_path(engine).read_text())
    document["file"]["sha256"] = hashlib.sha256(content).hexdigest()
    sidecar_path(engine).write_text(json.dumps(document))


NEED_ONNX = (
    *("comparison", "graph", "reading", "targets", "writing"),
    *(f"libspconv.{name}" for name in ("arithmetic", "dialect", "reader", "refusals", "writer")),
    *(f"portable.{name}" for name in ("digits", "fast", "fast_reader", "reader", "rulebooks", "writer")),
    *(f"tensorrt.{name}" for name in ("lint", "model_view", "reader", "writer")),
)
"""Modules of the room `export` that import onnx, themselves or by another."""


def take_away(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnx or onnxruntime were not installed, and nothing that needs onnx were imported yet."""
    for module in NEED_ONNX:
        monkeypatch.delitem(sys.modules, f"cpq_train.export.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
