"""Whether a fit comes to a validation."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from cpq_train.callbacks.checkpoints import RunCheckpoints
from cpq_train.callbacks.validations import has_validation, why_none


def _fit(**settings: Any) -> Any:
    """A trainer in a fit of 3 epochs of 8 batches, validated after each."""
    every = {"num_training_batches": 8, "val_check_batch": 8, "check_val_every_n_epoch": 1}
    ends = {"max_epochs": 3, "max_steps": -1, "accumulate_grad_batches": 1}
    stated = {**every, **ends, "enable_validation": True, "limit_val_batches": 1.0, "val_check_interval": 1.0}
    return SimpleNamespace(**{**stated, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"check_val_every_n_epoch": 3}, True),
        ({"check_val_every_n_epoch": 4}, False),
        ({"check_val_every_n_epoch": 4, "max_epochs": -1}, True),
        ({"check_val_every_n_epoch": 3, "max_epochs": -1, "max_steps": 23}, False),
        ({"check_val_every_n_epoch": 3, "max_epochs": -1, "max_steps": 24}, True),
        ({"check_val_every_n_epoch": 4, "val_check_batch": 2, "max_epochs": 4, "max_steps": 25}, False),
        ({"check_val_every_n_epoch": 4, "val_check_batch": 2, "max_epochs": 4, "max_steps": 26}, True),
        ({"check_val_every_n_epoch": None, "val_check_batch": 24}, True),
        ({"check_val_every_n_epoch": None, "val_check_batch": 25}, False),
        ({"val_check_batch": math.inf}, True),
        ({"val_check_batch": None, "check_val_every_n_epoch": 1}, True),
        ({"accumulate_grad_batches": 3, "max_steps": 2}, False),  # 6 batches
        ({"accumulate_grad_batches": 3, "max_steps": 3}, True),  # the third sums up two
        ({"enable_validation": False, "limit_val_batches": 0}, False),
    ],
)
def test_a_fit_comes_to_a_validation(settings: dict[str, Any], expected: bool) -> None:
    assert has_validation(_fit(**settings)) == expected


def test_why_a_fit_comes_to_none() -> None:
    assert why_none(_fit(enable_validation=False, limit_val_batches=0)) == "trainer.limit_val_batches 0"
    said = "trainer.check_val_every_n_epoch 4 with trainer.max_epochs 3"
    assert why_none(_fit(check_val_every_n_epoch=4)) == said
    said = "trainer.check_val_every_n_epoch None, trainer.val_check_interval 25 with trainer.max_steps 9"
    late = _fit(check_val_every_n_epoch=None, val_check_interval=25, max_epochs=None, max_steps=9)
    assert why_none(late) == said


@pytest.mark.parametrize(
    "settings", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 5}, {"max_steps": 1}, {}]
)
def test_a_fit_without_a_validation_leaves_its_last_checkpoint(
    settings: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """And says so in a line, without Lightning's of a metric that nobody logged."""
    callback = RunCheckpoints(tmp_path, monitor="val/NDS", mode="max", save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    few = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], **{**quiet, **few, **settings})
    model = BoringModel()
    model.on_validation_epoch_end = lambda: model.log("val/NDS", 0.5)  # type: ignore[method-assign]
    warnings.simplefilter("always")
    trainer.fit(model)
    said = [str(w.message) for w in recwarn]
    assert sum("no validation falls within this fit" in text for text in said) == bool(settings)
    assert not any("could not find the monitored key" in text for text in said)
    assert (tmp_path / "last.ckpt").is_file()
    assert bool(callback.best_model_path) != bool(settings)
