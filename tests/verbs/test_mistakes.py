"""Mistakes that end in one line and code 2 before there is any work, runs on few batches, and Ctrl-C."""

import csv
import errno
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from command_line import fails
from lightning.pytorch import Trainer
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.common.errors import UserError
from cpq_train.common.files import check_output, check_writable
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main
from cpq_train.verbs.fit_checks import losses
from cpq_train.verbs.mistakes import naming_mistakes

Capture = pytest.CaptureFixture[str]

FITS = {
    "--trainer.strategy fsdp": "trainer.strategy fsdp: The strategy `fsdp` requires a GPU",
    "--trainer.barebones true": "trainer.barebones is true, .*accepted: false",
    "--trainer.devices 0": "trainer.devices 0, .*not a valid input",
    "--trainer.max_epochs -1": "trainer.max_epochs and trainer.max_steps are -1: .*accepted: one",
    "--ckpt_path hpc": "ckpt_path is 'hpc'; accepted: a checkpoint file, or last",
    "--ckpt_path best": "ckpt_path is 'best'; accepted",
    "--checkpoint.monitor train/los": "monitor of RunCheckpoints is 'train/los'; accepted: val/mAP",
    "--trainer.val_check_interval 1.5": "^error: You have passed invalid value 1.5 for val_check_interval",
    "--checkpoint.monitor val/foo": "monitor of RunCheckpoints is 'val/foo'; accepted: val/mAP, val/NDS",
    "--trainer.callbacks+=LearningRateFinder": "trainer.callbacks names LearningRateFinder",
    "--trainer.callbacks+=BackboneFinetuning": "trainer.callbacks names BackboneFinetuning",
    "--trainer.logger MLFlowLogger": "Requirement 'mlflow",
    "--trainer.default_root_dir runs/{SLURM_ARRAY_TASK_ID}": "accepted: .* that sbatch --array started",
}


@pytest.mark.parametrize("options", FITS)
def test_a_fit_that_cannot_be(options: str, simulated_root: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    said = fails(["fit", "-c", BASE, *tiny_options(simulated_root, run), *options.split()], capsys)
    assert re.search(FITS[options], said), said
    assert not run.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(simulated_root: Path, tmp_path: Path, capsys: Capture) -> None:
    options = [*tiny_options(simulated_root, tmp_path), "--trainer.accelerator", "gpu"]
    said = fails(["fit", "-c", BASE, *options], capsys)
    assert "trainer.accelerator gpu, " in said
    assert "No supported gpu backend found! This machine has 0 GPUs" in said


def test_places_that_take_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "new/folder", "output")
    check_output(file)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]  # nothing is made by looking
    with pytest.raises(UserError, match=r"output '.*/file/x': '.*/file' is no folder; accepted: a folder to"):
        check_writable(file / "x", "output")
    with pytest.raises(UserError, match=r"output '.*' is a folder; accepted: a file"):
        check_output(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as of a read-only disk, for root too
    with pytest.raises(UserError, match=r"output '.*/x': '.*' cannot be written to"):
        check_writable(tmp_path / "x", "output")


OUTPUTS = {
    "simulate": ["simulate", "--num_scenes", "1", "--output", "FILE/x"],
    "compare": ["compare", "runs/none", "--output", "FILE/x"],
    "convert": ["convert", "--input", "none.pth", "--source", "openpcdet", "--output", "FILE/x.ckpt"],
    "export": ["export", "none.ckpt", "--output", "FILE/x.onnx"],
    "verify": ["verify", "none.ckpt", "--output", "FILE/x.json"],
    "calibrate": ["calibrate", "-c", BASE, "--model.weights", "none.ckpt", "--output", "FILE/x.ckpt"],
    "sensitivity": ["sensitivity", "-c", BASE, "--model.weights", "none.ckpt", "--output", "FILE/x"],
    "profile": ["profile", "-c", BASE, "--output", "FILE/x"],
}


@pytest.mark.parametrize("verb", OUTPUTS)
def test_outputs_are_looked_at_first(verb: str, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file"
    file.touch()
    said = fails([word.replace("FILE", str(file)) for word in OUTPUTS[verb]], capsys)
    assert f"'{file}' is no folder; accepted: a folder to write to" in said


def test_a_run_folder_that_is_a_file(arms: dict, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file"
    file.touch()
    weights = str(arms["float"] / "checkpoints/last.ckpt")
    options = ["--model.weights", weights, "--trainer.default_root_dir", str(file)]
    said = fails(["predict", "-c", BASE, *options, "--clouds", str(file)], capsys)
    assert f"trainer.default_root_dir '{file}'" in said


def _fail_with(error: Exception) -> None:
    with naming_mistakes():
        raise error


def test_what_a_library_or_the_system_says() -> None:
    with pytest.raises(UserError, match="'a/b' cannot be used: Permission denied"):
        _fail_with(PermissionError(errno.EACCES, "Permission denied", "a/b"))
    with pytest.raises(OSError, match="too many"):
        _fail_with(OSError(errno.EMFILE, "too many open files", "a/b"))
    with pytest.raises(ValueError, match="our own fault"):
        _fail_with(ValueError("our own fault"))
    with (
        pytest.raises(UserError, match=r"^You have passed invalid value -3 for limit_val"),
        naming_mistakes(),
    ):
        Trainer(limit_val_batches=-3)


def test_a_partial_score(arms: dict, simulated_root: Path, tmp_path: Path, capfd: Capture) -> None:
    """1 is one batch, 1.0 would be all."""
    options = [*tiny_options(simulated_root, tmp_path), "--trainer.limit_val_batches", "1"]
    weights = str(arms["qat"] / "checkpoints/last.ckpt")
    main(["validate", "-c", BASE, "-c", OVERLAY, *options, "--model.weights", weights])
    printed = capfd.readouterr().out
    assert (
        "partial score: 2 of 4 samples (trainer.limit_val_batches 1); metrics.json is not written" in printed
    )
    assert "val/NDS" in printed
    assert not (tmp_path / "metrics.json").exists()
    main(["validate", "-c", BASE, "-c", OVERLAY, *options[:-1], "9", "--model.weights", weights])
    assert "partial" not in capfd.readouterr().out  # more than there are
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("limit", ["fast_dev_run 1", "overfit_batches 1", "limit_val_batches 0"])
def test_a_fit_on_few_batches(
    limit: str, arms: dict, simulated_root: Path, tmp_path: Path, capfd: Capture
) -> None:
    run = tmp_path / "run"
    often = ["--trainer.log_every_n_steps", "1"]
    options = [*tiny_options(simulated_root, run), *f"--trainer.{limit}".split(), *often]
    weights = str(arms["ptq"] / "ptq.ckpt")
    main(["fit", "-c", BASE, "-c", OVERLAY, *options, "--model.weights", weights])
    printed = capfd.readouterr().out
    assert ("partial score: 2 of 4 samples" in printed) == (limit != "limit_val_batches 0")
    assert not (run / "metrics.json").exists()
    assert not (tmp_path / "baselines").exists()  # a part of the samples is compared with no baseline
    is_kept = limit != "fast_dev_run 1"
    if is_kept:  # a monitor may name every loss that is logged, and no other
        with (run / "metrics.csv").open() as file:
            logged = {name.removesuffix("_step") for name in next(csv.reader(file))}
        model = CenterPointDetector.load_from_checkpoint(run / "checkpoints/last.ckpt")
        assert {name for name in logged if name.startswith("train/")} == losses(model)
    assert (run / "checkpoints/last.ckpt").exists() == is_kept
    assert run.exists() == is_kept


def test_a_part_of_a_submission(arms: dict, simulated_root: Path, tmp_path: Path, capfd: Capture) -> None:
    options = [*tiny_options(simulated_root, tmp_path), "--trainer.limit_test_batches", "1"]
    weights = str(arms["float"] / "checkpoints/last.ckpt")
    main(["test", "-c", BASE, *options, "--data.test_split", "val", "--model.weights", weights])
    assert "2 samples are detected in (trainer.limit_test_batches 1); results_nusc.json is not written" in (
        capfd.readouterr().out
    )
    assert not (tmp_path / "results_nusc.json").exists()


def test_a_task_of_an_array(
    arms: dict, simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    options = tiny_options(simulated_root, tmp_path / "run{SLURM_ARRAY_TASK_ID}")
    main(
        [
            "fit",
            "-c",
            BASE,
            *options,
            "--trainer.limit_train_batches",
            "1",
            "--trainer.limit_val_batches",
            "1",
        ]
    )
    assert (tmp_path / "run3/checkpoints/last.ckpt").is_file()
    assert [one.name for one in tmp_path.iterdir()] == ["run3"]


def _interrupt(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("verb", ["simulate", "validate"])
def test_ctrl_c(
    verb: str,
    arms: dict,
    simulated_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Capture,
) -> None:
    """In the midst of a verb: a line, no traceback, nothing half-written."""
    monkeypatch.setattr(sys.modules["cpq_train.simulator.simulate"], "shared_tables", _interrupt)
    monkeypatch.setattr("cpq_train.callbacks.evaluation.Evaluation.on_validation_batch_end", _interrupt)
    weights = str(arms["float"] / "checkpoints/last.ckpt")
    options = {
        "simulate": ["--output", str(tmp_path / "run"), "--num_scenes", "1", "--num_samples_per_scene", "1"],
        "validate": ["-c", BASE, *tiny_options(simulated_root, tmp_path / "run"), "--model.weights", weights],
    }
    with pytest.raises(SystemExit) as exit_:
        main([verb, *options[verb]])
    assert exit_.value.code == 128 + signal.SIGINT
    said = capfd.readouterr().err
    assert said.endswith("SIGINT: ended before it was done\n")
    assert "Traceback" not in said
    assert {one.name for one in tmp_path.rglob("*")} <= {"run", "config.yaml"}
