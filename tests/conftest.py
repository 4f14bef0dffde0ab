"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))

SHARED = Path(os.environ.get("CPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set CPQ_SHARED to the folder that holds {name}/")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the real OpenPCDet code."""
    return _folder("golden")


@pytest.fixture(scope="session")
def realdata_dir() -> Path:
    """Real nuScenes tables, clouds and a submission with its published score."""
    return _folder("realdata")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Name tables of the state dictionaries of other projects."""
    return _folder("reference")


@pytest.fixture(scope="session")
def simulated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny simulated data set: three training and two validation scenes of two key frames each."""
    from cpq_train.data.simulator import simulate

    root = tmp_path_factory.mktemp("simulated") / "root"
    simulate(root, num_scenes=5, num_val_scenes=2, num_samples_per_scene=2, version="v1.0-trainval", seed=3)
    return root
