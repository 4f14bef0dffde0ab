"""The state of all generators survives a file that holds plain values only."""

import random
from pathlib import Path

import numpy as np
import torch

from cpq_train.random_state import random_state, set_random_state


def _draws() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(1).item()]


def test_draws_repeat(tmp_path: Path) -> None:
    np.random.randn()  # NumPy and Python keep every second Gaussian for the next call
    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state")
    expected = _draws()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert _draws() == expected
