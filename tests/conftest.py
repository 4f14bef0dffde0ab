"""Fixtures that every room's tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.data.index import NuScenesIndex, open_index
from cpq_train.evaluation.boxes import GroundTruth
from cpq_train.evaluation.ground_truth import ground_truth

# One thread, here and in every process that a test starts: a forked process hangs in a pool of threads that
# its parent has opened, and bits are compared between processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would the processes whose signals are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(os.environ.get("CPQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The one way to say that a test needs GPUs: `@pytest.mark.cuda`, or `cuda(num_devices=2)`."""
    mark = item.get_closest_marker("cuda")
    if mark is not None:
        needed, found = mark.kwargs.get("num_devices", 1), torch.cuda.device_count()
        if found < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' * (needed > 1)}, found {found}")


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
def seed_text() -> str:
    """The text that this project began with: its module tree and storage tables are reproduced."""
    path = SHARED / "seed.md"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set CPQ_SHARED to the folder that holds it")
    return path.read_text()


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


@pytest.fixture
def ddp_leaves_nothing() -> Iterator[None]:
    """DDP in this process, though on one rank, would leave its process group and variables to later tests."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def simulated_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny simulated data set: three training and two validation scenes of two key frames each."""
    from cpq_train.simulator import simulate

    root = tmp_path_factory.mktemp("simulated") / "root"
    simulate(root, num_scenes=5, num_val_scenes=2, num_samples_per_scene=2, version="v1.0-trainval", seed=3)
    return root


@pytest.fixture(scope="session")
def arms(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All four arms of a tiny model, made by the command line."""
    from cpq_train.verbs.cli import main

    runs = tmp_path_factory.mktemp("runs")
    fit = ["fit", "-c", BASE]
    tune = ["-c", OVERLAY]
    main([*fit, *tiny_options(simulated_root, runs / "float")])
    weights = runs / "float/checkpoints/last.ckpt"
    ptq = runs / "ptq/ptq.ckpt"
    main(
        [
            "calibrate",
            "-c",
            BASE,
            *tune,
            *tiny_options(simulated_root, runs / "ptq"),
            "--model.weights",
            str(weights),
            "--output",
            str(ptq),
        ]
    )
    main(["validate", "-c", BASE, *tiny_options(simulated_root, runs / "ptq"), "--model.weights", str(ptq)])
    main([*fit, *tune, *tiny_options(simulated_root, runs / "qat"), "--model.weights", str(ptq)])
    main(
        [
            *fit,
            *tune,
            *tiny_options(simulated_root, runs / "float_tuned"),
            "--model.arm",
            "float_tuned",
            "--model.weights",
            str(weights),
        ]
    )
    return {arm: runs / arm for arm in ("float", "ptq", "qat", "float_tuned")}
