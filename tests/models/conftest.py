"""Golden arrays, loaded once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Operations this small only lose by threads, and on a busy machine they lose a lot."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def eval_arrays(golden_dir: Path) -> Any:
    return np.load(golden_dir / "golden_eval.npz")


@pytest.fixture(scope="session")
def train_arrays(golden_dir: Path) -> Any:
    return np.load(golden_dir / "golden_train.npz")


@pytest.fixture(scope="session")
def target_arrays(golden_dir: Path) -> Any:
    return np.load(golden_dir / "golden_targets.npz")


@pytest.fixture(scope="session")
def nms_arrays(golden_dir: Path) -> Any:
    return np.load(golden_dir / "golden_nms.npz")
