"""Data sets that the tests of this room share."""

import runpy
from pathlib import Path

import pytest

from cpq_train.data.index import NuScenesIndex, open_index


@pytest.fixture(scope="session")
def fake_root(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic data set that the golden submission belongs to."""
    root = tmp_path_factory.mktemp("fake")
    runpy.run_path(str(golden_dir / "make_fake_nusc.py"))["make"](str(root))
    return root


@pytest.fixture(scope="session")
def fake_index(fake_root: Path) -> NuScenesIndex:
    return open_index(fake_root, "v1.0-mini")
