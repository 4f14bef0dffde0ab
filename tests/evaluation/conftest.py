"""Data sets and ground truth that the tests of this room share."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.evaluation.boxes import GroundTruth
from cpq_train.evaluation.ground_truth import ground_truth


@pytest.fixture(scope="session")
def mini_index(realdata_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NuScenesIndex:
    cache = tmp_path_factory.mktemp("mini_index")
    return open_index(realdata_dir / "nuscenes_mini_val", "v1.0-mini", cache)


@pytest.fixture(scope="session")
def mini_rows(mini_index: NuScenesIndex) -> NDArray[np.int64]:
    return mini_index.sample_rows("mini_val")


@pytest.fixture(scope="session")
def mini_gt(mini_index: NuScenesIndex, mini_rows: NDArray[np.int64]) -> GroundTruth:
    return ground_truth(mini_index, mini_rows)


@pytest.fixture(scope="session")
def fake_root(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic data set that the golden submission belongs to."""
    root = tmp_path_factory.mktemp("fake")
    runpy.run_path(str(golden_dir / "make_fake_nusc.py"))["make"](str(root))
    return root


@pytest.fixture(scope="session")
def fake_index(fake_root: Path) -> NuScenesIndex:
    return open_index(fake_root, "v1.0-mini")
