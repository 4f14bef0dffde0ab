"""A made-up data set in the nuScenes format, and the index of the real one."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from cpq_train.data.index import NuScenesIndex, open_index


@pytest.fixture(scope="session")
def pristine_root(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that golden_infos was made from: two scenes of four samples; do not change it."""
    spec = importlib.util.spec_from_file_location("make_fake_nusc", golden_dir / "make_fake_nusc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("data") / "made_up"
    module.make(str(root))
    return root


@pytest.fixture
def root(pristine_root: Path, tmp_path: Path) -> Path:
    """A copy to damage, without an index."""
    copy = tmp_path / "made_up"
    shutil.copytree(pristine_root, copy, ignore=shutil.ignore_patterns(".cpq_train"))
    return copy


@pytest.fixture(scope="session")
def index(pristine_root: Path) -> NuScenesIndex:
    return open_index(pristine_root, "v1.0-mini")


@pytest.fixture(scope="session")
def real_tokens() -> list[str]:
    """The two real samples whose key frames exist."""
    return ["3e8750f331d7499e9b5123e9eb70f2e2", "fdc39b23ab4242eda6ec5e1e6574fe33"]


@pytest.fixture(scope="session")
def real_index(realdata_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NuScenesIndex:
    return open_index(realdata_dir / "nuscenes_mini_val", "v1.0-mini", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def simulated_cache(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the index of the simulated root and the GT database of its training split (2 sweeps) lie."""
    from cpq_train.data.gt_database import build_gt_database

    cache = tmp_path_factory.mktemp("gt_database")
    build_gt_database(simulated_root, num_sweeps=2, num_workers=0, cache_dir=cache)
    return cache


@pytest.fixture(scope="session")
def simulated_index(simulated_root: Path, simulated_cache: Path) -> NuScenesIndex:
    return open_index(simulated_root, "v1.0-trainval", simulated_cache)
