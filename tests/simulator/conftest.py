from pathlib import Path
from typing import Any

import pytest

from cpq_train.simulator import simulate


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training and one validation scene with three key frames each."""
    root = tmp_path_factory.mktemp("simulated") / "mini"
    simulate(root, num_scenes=3, num_val_scenes=1, num_samples_per_scene=3, seed=5, num_workers=1)
    return root


@pytest.fixture(scope="session")
def wide_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes with one key frame each: as much variety as a quick test can have."""
    root = tmp_path_factory.mktemp("simulated") / "wide"
    simulate(root, num_scenes=10, num_val_scenes=2, num_samples_per_scene=1, seed=11, num_workers=2)
    return root


@pytest.fixture(scope="session")
def nusc(mini_root: Path) -> Any:
    from nuscenes import NuScenes

    return NuScenes("v1.0-mini", str(mini_root), verbose=False)
