"""Whether a fit comes to a validation."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

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
