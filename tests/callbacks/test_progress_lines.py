"""The lines of a run in its log, on a clock of the test's own; tests/verbs/test_cli.py has those of a fit."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpq_train.callbacks import progress as callback_module
from cpq_train.callbacks.progress import ProgressLines
from cpq_train.callbacks.resume_point import ResumePoint
from cpq_train.common import progress as progress_module
from cpq_train.common.errors import UserError

BATCH = {"batch_size": 4}


class Run:
    """A trainer as far as the callback looks at it, on two ranks, and its time."""

    def __init__(self, lines: ProgressLines) -> None:
        self.lines, self.now_s, self.resume = lines, 0.0, ResumePoint()
        self.trainer: Any = SimpleNamespace(
            callbacks=[self.resume, lines],
            callback_metrics={"train/loss": torch.tensor(2.34567)},
            is_global_zero=True,
            sanity_checking=False,
            world_size=2,
            current_epoch=0,
            max_epochs=2,
            estimated_stepping_batches=200,
            global_step=0,
            num_val_batches=[10],
        )

    def begin(self) -> None:
        self.lines.on_train_start(self.trainer, None)  # type: ignore[arg-type]

    def steps(self, number: int, seconds: float = 1.0) -> None:
        for _ in range(number):
            self.lines.on_train_batch_start(self.trainer, None, BATCH, 0)  # type: ignore[arg-type]
            self.now_s += seconds
            self.trainer.global_step += 1
            self.lines.on_train_batch_end(self.trainer, None, None, BATCH, 0)  # type: ignore[arg-type]

    def validate(self, seconds: float, **scores: float) -> None:
        self.lines.on_validation_start(self.trainer, None)  # type: ignore[arg-type]
        for _ in range(10):
            self.now_s += seconds / 10
            self.lines.on_validation_batch_end()
        self.trainer.callback_metrics |= {f"val/{k}": torch.tensor(v) for k, v in scores.items()}
        self.lines.on_validation_end(self.trainer, None)  # type: ignore[arg-type]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run = Run(ProgressLines())
    fake = SimpleNamespace(monotonic=lambda: run.now_s, strftime=lambda _: "-")
    monkeypatch.setattr(progress_module, "time", fake)
    monkeypatch.setattr(callback_module, "time", fake)
    return run


def test_lines_of_a_fit(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.begin()
    run.steps(100)
    run.validate(50, mAP=0.25, NDS=0.5, mAP_minus_float=-0.0123, mAP_minus_ptq=0.004)
    run.trainer.current_epoch = 1
    run.steps(1)
    run.lines.on_train_end(run.trainer, None)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "- training begins: epoch 0/1, step 0/200",
        "- epoch 0/1, step 30/200, loss 2.346, 8 samples/s, 0:02:50 left",
        "- epoch 0/1, step 60/200, loss 2.346, 8 samples/s, 0:02:20 left",
        "- epoch 0/1, step 90/200, loss 2.346, 8 samples/s, 0:01:50 left",
        "- Validating (batches): 6 of 10, 60 %, 0.2 per s, 0:00:20 left",
        "- validation: epoch 0/1, step 100/200, mAP 0.2500 (-0.0123 to float, +0.0040 to PTQ), "
        "NDS 0.5000, 0:00:50",
        "- epoch 1/1, step 101/200, loss 2.346, 8 samples/s, 0:02:28 left",
        "- training ends: step 101/200, 0:02:31",
    ]


def test_what_is_saved_is_said_once_in_n_seconds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.trainer.global_step = run.resume.saved_step = 7
    run.begin()
    for step in range(7, 67):  # saved before every step
        run.resume.saved_step = step
        run.steps(1)
    saved = [line for line in capsys.readouterr().err.splitlines() if "saved" in line]
    assert saved == ["- saved at step 8", "- saved at step 38"]
    run.validate(40)
    assert "- saved at step 66\n" not in capsys.readouterr().err
    run.steps(1)
    assert capsys.readouterr().err.count("saved at step 66") == 1


def test_a_resumed_fit_without_an_end(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.trainer.global_step = run.resume.saved_step = 120
    run.trainer.max_epochs = -1
    run.trainer.estimated_stepping_batches = math.inf
    run.begin()
    run.steps(30)
    assert capsys.readouterr().err.splitlines() == [
        "- training goes on: epoch 0, step 120",
        "- epoch 0, step 150, loss 2.346, 8 samples/s",
    ]


def test_an_evaluation_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.validate(50)
    assert capsys.readouterr().err.splitlines() == [
        "- Validating (batches): 6 of 10, 60 %, 0.2 per s, 0:00:20 left",
        "- Validating (batches): 10 in 0:00:50",
    ]


@pytest.mark.parametrize("why", ["terminal", "null", "rank 1"])
def test_where_nothing_is_printed(
    why: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callback_module, "draws_bars", lambda: why == "terminal")
    run.lines.every_n_seconds = None if why == "null" else 30.0
    run.trainer.is_global_zero = why != "rank 1"
    run.begin()
    run.resume.saved_step = 5
    run.steps(100)
    run.validate(50)
    run.lines.on_train_end(run.trainer, None)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_an_interval_that_is_none() -> None:
    with pytest.raises(UserError, match=r"progress\.every_n_seconds is 0: expected"):
        ProgressLines(0)
