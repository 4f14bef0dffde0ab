"""One of every file that the project reads, on simulated data, and copies of them to damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from fuzzing.running import run

BASE = Path("configs/quickstart_float.yaml").resolve()
OVERLAY = Path("configs/quickstart_qat.yaml").resolve()
SCHEME = Path("configs/schemes/int8.yaml").resolve()

VERSION = "v1.0-trainval"

OUTSIDE = "outside"
"""Folder of files that belong to no reader, and stay as they are."""

LINKED = ("samples", "sweeps", "maps")
"""Folders of a data root that no reader writes to: copies of a workspace have links to them."""

FLOAT, QAT = "float/checkpoints/last.ckpt", "qat/checkpoints/last.ckpt"

BUILD_TIMEOUT_S = 600.0
"""What a command that makes a file of a workspace may take on a busy machine."""

TINY = [
    *("--model.network.voxel_size", "[0.64, 0.64, 0.32]", "--data.num_sweeps", "2"),
    *("--model.post_processing.score_threshold", "0"),  # boxes, though hardly anything is learned
    *("--data.batch_size", "2", "--data.num_workers", "0", "--data.num_calibration_samples", "2"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--data.root", "data", "--baselines.cache_dir", "baselines", "--data.gt_sampling.targets", "{car: 2}"),
]
"""Options of every verb that runs a network, from inside a workspace."""


SENSITIVITY = [
    *("--model.weights", FLOAT, "--output", "sensitivity"),
    *("--num_samples", "1", "--bits", "[8]"),
]
"""Options of an analysis."""


def build(folder: Path) -> None:
    """Make a workspace: data and its caches, checkpoints, run folders, an engine file, foreign checkpoints.

    Raises:
        RuntimeError: A command fails; names its log.
    """
    for name in ("documents", "0123456789abcdef"):
        (folder / OUTSIDE / name).mkdir(parents=True)
        (folder / OUTSIDE / name / "letter").write_text("of the user")
    (folder / OUTSIDE / "letter").write_text("process 1 on a host")  # as a lock
    (folder / OUTSIDE / ".lock").write_text("process 1 on a host")
    shutil.copy(SCHEME, folder / "scheme.yaml")
    for number, arguments in enumerate(_commands()):
        log = folder.with_name(f"{folder.name}-{number}.log")
        ending = run(list(arguments), folder, log, BUILD_TIMEOUT_S)
        if ending.code != 0:
            raise RuntimeError(f"{' '.join(arguments)} ended with {ending.code}, see {log}")
    torch.save(torch.load(folder / "foreign.pth", weights_only=True), folder / "foreign-archive.pth")
    (folder / "clouds").mkdir()
    shutil.copy(next((folder / "data/samples/LIDAR_TOP").iterdir()), folder / "clouds/0.bin")


def _commands() -> list[Sequence[str]]:
    simulate = ["--num_scenes", "5", "--num_val_scenes", "2", "--num_samples_per_scene", "2", "--seed", "3"]
    float_ = ["-c", str(BASE), *TINY]
    tuned = ["-c", str(BASE), "-c", str(OVERLAY), *TINY, "--model.scheme", "scheme.yaml"]
    weights = ["--model.weights", FLOAT]
    return [
        ("simulate", "--output", "data", "--version", VERSION, *simulate),
        ("build-gt-database", "--root", "data", "--version", VERSION, "--num_sweeps", "2"),
        ("fit", *float_, "--trainer.default_root_dir", "float"),
        ("calibrate", *tuned, *weights, "--output", "ptq/ptq.ckpt", "--trainer.default_root_dir", "ptq"),
        ("validate", *float_, "--model.weights", "ptq/ptq.ckpt", "--trainer.default_root_dir", "ptq"),
        ("fit", *tuned, "--model.weights", "ptq/ptq.ckpt", *qat_run(), "--resume.every_n_steps", "1"),
        ("sensitivity", *tuned, *SENSITIVITY, "--trainer.default_root_dir", "ptq"),
        ("profile", *float_, QAT, "--output", "qat", "--num_passes", "1"),
        ("export", QAT, "--output", "engine/qat.onnx"),
        (
            "convert",
            "--input",
            "float/checkpoints/last.ckpt",
            "--target",
            "openpcdet",
            "--output",
            "foreign.pth",
        ),
    ]


def qat_run() -> list[str]:
    """Options of the fit with fake quantization."""
    return ["--trainer.default_root_dir", "qat"]


def copy(workspace: Path, place: Path, own_tables: bool) -> None:
    """A workspace of its own.

    Args:
        workspace: The original, which stays as it is.
        place: The copy; files that are never changed in place are links.
        own_tables: Copy the tables of the data set too: the index, which knows them by their inodes, then
            hashes them.
    """
    linked = LINKED if own_tables else (*LINKED, VERSION)
    above = {str(workspace / "data"): linked}
    shutil.copytree(
        workspace,
        place,
        ignore=lambda folder, names: [name for name in names if name in above.get(folder, ())],
        copy_function=_linked,
    )
    for name in linked:
        (place / "data" / name).symlink_to(workspace / "data" / name)


def outside(place: Path) -> dict[str, bytes | str]:
    """What a workspace holds of files that belong to no reader."""
    files = sorted((place / OUTSIDE).rglob("*"))
    return {str(file): _content(file) for file in files if file.is_symlink() or not file.is_dir()}


def _content(file: Path) -> bytes | str:
    return os.readlink(file) if file.is_symlink() else file.read_bytes() if file.is_file() else "no file"


def _linked(source: str, place: str) -> None:
    """Checkpoints and engine files are replaced, never written into."""
    if source.endswith((".ckpt", ".pth", ".onnx")):
        os.link(source, place)
    else:
        shutil.copy2(source, place)
