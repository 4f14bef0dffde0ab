"""Runs of a tiny model that are interrupted and go on."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

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


@pytest.fixture(scope="session")
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


def start(args: list[str], log: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """The command line in a process of its own, forked: everything is imported there already."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(args, log, environment or {}))
    process.start()
    return process


def _run(args: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)  # pytest put others in their place
    main(args)


def wait_for(event: Callable[[], bool], process: BaseProcess, timeout_s: float = 120) -> None:
    """Wait until something is so while a process runs."""
    end_s = time.monotonic() + timeout_s
    while not event():
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < end_s
        time.sleep(0.02)


def wait_for_end(*processes: BaseProcess, timeout_s: float = 120) -> list[int | None]:
    """Exit codes; what does not end in time is killed, and its code is None."""
    end_s = time.monotonic() + timeout_s
    codes = []
    for process in processes:
        process.join(max(0.0, end_s - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        process.kill()
    return codes


def step_of(run: Path) -> int:
    """The step that the newest resume point stands before, -1 without any."""
    file = run / "checkpoints/resume.ckpt"
    try:
        step: int = torch.load(file, weights_only=True)["global_step"]
    except FileNotFoundError:
        return -1
    return step


def ranks(variables: dict[str, str], num_ranks: int = 2) -> list[dict[str, str]]:
    """Environments of ranks; `{rank}` in a value stands for the number of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [
        {name: value.format(rank=rank, num_ranks=num_ranks) for name, value in shared.items()}
        for rank in range(num_ranks)
    ]
