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
