"""Runs of a tiny model that are interrupted and go on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.cli import main
from cpq_train.detector import CenterPointDetector

State = dict[str, torch.Tensor]
Options = Callable[..., list[str]]


class Killed(BaseException):
    """Stands for the end of a process: nothing in the run catches it."""


@pytest.fixture(scope="session")
def float_weights(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("float") / "run"
    options = ["fit", "-c", BASE, *tiny_options(simulated_root, run)]
    main([*options, "--trainer.limit_train_batches", "1"])
    return run / "checkpoints/last.ckpt"


@pytest.fixture
def fit_options(simulated_root: Path, float_weights: Path) -> Options:
    """Options of a QAT fit of two epochs of six steps, into a folder."""

    def options(run: Path, *more: str) -> list[str]:
        return [
            *("fit", "-c", BASE, "-c", OVERLAY, *tiny_options(simulated_root, run)),
            *("--model.weights", str(float_weights), "--data.batch_size", "1"),
            *("--trainer.max_epochs", "2"),
            *("--resume.every_n_steps", "1", "--ckpt_path", "last"),
            *more,
        ]

    return options


@pytest.fixture
def kill_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the next fit die in the forward of a batch, counted from 0."""
    step = CenterPointDetector.training_step

    def kill(number: int) -> None:
        seen = iter(range(number + 1))

        def dying(self: CenterPointDetector, batch: dict, batch_idx: int) -> torch.Tensor:
            loss = step(self, batch, batch_idx)
            if next(seen) == number:
                monkeypatch.setattr(CenterPointDetector, "training_step", step)
                raise Killed
            return loss

        monkeypatch.setattr(CenterPointDetector, "training_step", dying)

    return kill


def weights(run: Path, name: str = "last.ckpt") -> State:
    """The weights and ranges that a run ended with."""
    state: State = torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]
    return state


def assert_equal(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
