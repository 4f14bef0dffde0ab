"""Golden arrays, loaded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
