"""Which checkpoints a run reads and has made."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cpq_train.loggers.artifacts import inputs, outputs
from cpq_train.loggers.wandb_run import run_id
from cpq_train.models.distillation import DistillationConfig


def _inputs(
    run_dir: Path, weights: Path | None, teacher: Path | None, ckpt_path: Path | None = None
) -> list[Path]:
    distillation = None if teacher is None else DistillationConfig(teacher=str(teacher))
    module: Any = SimpleNamespace(weights=weights and str(weights), distillation=distillation)
    trainer: Any = SimpleNamespace(ckpt_path=ckpt_path and str(ckpt_path))
    return inputs(trainer, module, run_dir)


def test_inputs(tmp_path: Path) -> None:
    run_dir, float_, ptq = tmp_path / "qat", tmp_path / "float.ckpt", tmp_path / "ptq.ckpt"
    run_dir.mkdir()
    own = run_dir / "last.ckpt"
    for path in (float_, ptq, own):
        path.touch()
    assert _inputs(run_dir, None, None) == []
    assert _inputs(run_dir, ptq, float_) == [ptq, float_]
    assert _inputs(run_dir, float_, float_) == [float_]
    assert _inputs(run_dir, ptq, None, own) == [], "a resumed run goes on with its own"
    assert _inputs(run_dir, ptq, None, float_) == [float_], "a checkpoint that is loaded"
    ptq.unlink()
    assert _inputs(run_dir, own, ptq) == []


def _outputs(folder: Path, best: str, last: str) -> dict[str, tuple[set[str], dict[str, float]]]:
    callback = ModelCheckpoint(dirpath=folder, monitor="val/NDS", mode="max")
    callback.best_model_path, callback.last_model_path = str(folder / best), last and str(folder / last)
    callback.best_model_score = torch.tensor(0.5)
    metrics = {"val/NDS": torch.tensor(0.25), "val/mAP": torch.tensor(0.125)}
    trainer: Any = SimpleNamespace(checkpoint_callback=callback, callback_metrics=metrics)
    return {path.name: (set(names), dict(scores)) for path, (names, scores) in outputs(trainer).items()}


def test_outputs(tmp_path: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        (tmp_path / name).touch()
    now = {"NDS": 0.25, "mAP": 0.125}
    expected = {"best.ckpt": ({"best"}, {"NDS": 0.5}), "last.ckpt": ({"last"}, now)}
    assert _outputs(tmp_path, "best.ckpt", "last.ckpt") == expected
    (tmp_path / "folded.ckpt").touch()
    assert _outputs(tmp_path, "best.ckpt", "last.ckpt") == {**expected, "folded.ckpt": ({"folded"}, now)}
    os.utime(tmp_path / "folded.ckpt", (0, 0))  # of a former fit
    assert _outputs(tmp_path, "best.ckpt", "last.ckpt") == expected
    assert _outputs(tmp_path, "gone.ckpt", "gone.ckpt") == {}
    assert _outputs(tmp_path, "best.ckpt", "") == {"best.ckpt": ({"best"}, {"NDS": 0.5})}


def test_a_last_checkpoint_that_links_to_the_best(tmp_path: Path) -> None:
    (tmp_path / "best.ckpt").touch()
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    names, scores = _outputs(tmp_path, "best.ckpt", "last.ckpt")["best.ckpt"]
    assert names == {"last", "best"}
    assert scores == {"NDS": 0.25, "mAP": 0.125}


def test_run_id(tmp_path: Path) -> None:
    """Kept by the folder, also where it is moved; another arm or another folder of that name has its own."""
    ids = {arm: run_id(tmp_path / "run", arm) for arm in ("ptq", "qat")}
    (tmp_path / "run").rename(tmp_path / "moved")
    assert {arm: run_id(tmp_path / "moved", arm) for arm in ids} == ids
    assert len({*ids.values(), run_id(tmp_path / "run", "qat")}) == 3
