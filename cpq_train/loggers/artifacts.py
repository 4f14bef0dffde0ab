"""Checkpoints as W&B artifacts.

An artifact is named by the content of its checkpoint. So the one that a run reads and the one that another
run wrote are the same, wherever the file lies and whenever the runs were synced, and W&B joins the two.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from cpq_train.detector import CenterPointDetector
from cpq_train.interop.checkpoint import read_checkpoint, sha256_of

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
    metadata = {"sha256": sha256, **describe(read_checkpoint(path)), **(scores or {})}
    artifact = wandb.Artifact(f"checkpoint-{sha256[:12]}", type="model", metadata=metadata)
    artifact.add_file(str(path), name=FILE_NAME)
    return artifact


def describe(checkpoint: Mapping[str, Any]) -> Metadata:
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
    """Say that a run reads an artifact.

    Offline `use_artifact` refuses. What it does with an artifact that is not logged yet works there too: the
    artifact goes along, and the sync of the run notes its use once W&B has it.
    """
    if run.offline:
        run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def inputs(trainer: Trainer, module: CenterPointDetector, run_dir: Path) -> list[Path]:
    """The checkpoints that a run reads: the one it starts from or scores, and its teacher.

    Those of its own run directory are left out: a run does not descend from itself.
    """
    teacher = module.distillation and module.distillation.teacher
    given = [Path(path) for path in (trainer.ckpt_path or module.weights, teacher) if path is not None]
    return _distinct(path for path in given if not path.resolve().is_relative_to(run_dir.resolve()))


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list({os.path.realpath(path): path for path in paths if path.is_file()}.values())


def outputs(trainer: Trainer) -> dict[Path, tuple[list[str], Mapping[str, float]]]:
    """Checkpoint -> its aliases and scores: the best and the last one of a fit, which may be the same."""
    callback = trainer.checkpoint_callback
    found: dict[Path, tuple[list[str], Mapping[str, float]]] = {}
    if not isinstance(callback, ModelCheckpoint):
        return found
    best, last = callback.best_model_path, callback.last_model_path
    if last and Path(last).is_file():
        now = {name: trainer.callback_metrics.get(f"val/{name}") for name in ("NDS", "mAP")}
        scores = {name: float(value) for name, value in now.items() if value is not None}
        found[Path(os.path.realpath(last))] = (["latest", "last"], scores)
    if best and Path(best).is_file():
        score = callback.best_model_score
        name = str(callback.monitor).removeprefix("val/")
        known = {} if score is None else {name: float(score)}
        aliases, scores = found.get(Path(os.path.realpath(best)), ([], {}))
        found[Path(os.path.realpath(best))] = (["best", *aliases], {**known, **scores})
    return found
