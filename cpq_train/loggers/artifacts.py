"""Checkpoints as W&B artifacts.

An artifact is named by the content of its checkpoint. So the one that a run reads and the one that another
run wrote are the same, wherever the file lies and whenever the runs were synced, and W&B joins the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.files import sha256_of
from cpq_train.common.wandb_private import use_offline
from cpq_train.training.detector import FOLDED_FILE, CenterPointDetector

if TYPE_CHECKING:
    import wandb

FILE_NAME = "model.ckpt"

Metadata = dict[str, Any]


def checkpoint_artifact(path: Path, scores: Mapping[str, float] | None = None) -> wandb.Artifact:
    """The artifact of a checkpoint, not logged yet.

    Args:
        path: The checkpoint.
        scores: What it scored, as far as it is known.

    Raises:
        UserError: The file is no checkpoint of this project.
    """
    import wandb

    sha256 = sha256_of(path)
    metadata = {"sha256": sha256, **checkpoint_metadata(read_checkpoint(path)), **(scores or {})}
    artifact = wandb.Artifact(f"checkpoint-{sha256[:12]}", type="model", metadata=metadata)
    artifact.add_file(str(path), name=FILE_NAME)
    return artifact


def checkpoint_metadata(checkpoint: Mapping[str, Any]) -> Metadata:
    """What is said of a checkpoint: arm, scheme, parents and step."""
    description = checkpoint["quantization"]
    scheme = description["scheme"]
    return {
        "arm": description["arm"],
        "scheme": None if scheme is None else scheme["name"],
        "batchnorm": description["batchnorm"],
        "parents": dict(description["parents"]),
        "global_step": checkpoint["global_step"],
    }


def use(run: wandb.Run, artifact: wandb.Artifact) -> None:
    """Say that a run reads an artifact."""
    if run.offline:
        use_offline(run, artifact)
    else:
        run.use_artifact(artifact)


def inputs(trainer: Trainer, module: CenterPointDetector, run_dir: Path) -> list[Path]:
    """The checkpoints that a run reads: the one it starts from or scores, and its teacher.

    Those of its own run directory are left out: a run does not descend from itself.
    """
    teacher = None if module.distillation is None else module.distillation.teacher
    given = [Path(path) for path in (trainer.ckpt_path or module.weights, teacher) if path is not None]
    foreign = [path for path in given if not path.resolve().is_relative_to(run_dir.resolve())]
    return list({path.resolve(): path for path in foreign if path.is_file()}.values())


def outputs(trainer: Trainer) -> dict[Path, tuple[list[str], Mapping[str, float]]]:
    """Checkpoint -> its aliases and scores: what a fit has made.

    The best and the last one, which may be the same, and the last one with BatchNorm folded.
    """
    found: dict[Path, tuple[list[str], Mapping[str, float]]] = {}
    if isinstance(trainer.checkpoint_callback, ModelCheckpoint):
        for path, alias, scores in _made(trainer.checkpoint_callback, _scores(trainer.callback_metrics)):
            if path.is_file():
                aliases, known = found.get(path.resolve(), ([], {}))
                found[path.resolve()] = ([*aliases, alias], {**scores, **known})
    return found


def _made(
    callback: ModelCheckpoint, now: Mapping[str, float]
) -> Iterator[tuple[Path, str, Mapping[str, float]]]:
    last = Path(callback.last_model_path)
    yield last, "last", now
    yield Path(callback.best_model_path), "best", _scores({str(callback.monitor): callback.best_model_score})
    folded = last.parent / FOLDED_FILE
    if last.is_file() and folded.is_file() and folded.stat().st_mtime >= last.stat().st_mtime:
        yield folded, "folded", now  # an older one is of a former fit


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """NDS and mAP, as far as they are there."""
    names = {name: metrics.get(f"val/{name}") for name in ("NDS", "mAP")}
    return {name: float(value) for name, value in names.items() if value is not None}
