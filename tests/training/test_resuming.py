"""A run goes on as it began: what differs is refused before anything is done, and nothing else is needed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import fails
from old_files import CHECKPOINTS, SCHEMA_1, small_options

from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A qat run to go on with."""
    shutil.copytree(SCHEMA_1 / "qat", tmp_path / "qat")
    return tmp_path / "qat"


def _scheme(folder: Path) -> str:
    content = {"name": "w4", "defaults": {"weight": {"bits": 4}, "input": {"method": "max"}}}
    (folder / "w4.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "w4.yaml")


DIFFERENCES = {
    "arm": (["--model.arm", "float_tuned"], "model.arm: checkpoint qat, now float_tuned"),
    "ranges": (["--model.ranges.amax", "learned"], "model.ranges.amax: checkpoint frozen, now learned"),
    "momentum": (["--model.ranges.momentum", "0.5"], "model.ranges.momentum: checkpoint 0.1, now 0.5"),
    "batchnorm": (["--model.batchnorm", "frozen"], "model.batchnorm: checkpoint folded, now frozen"),
    "scheme": (["--model.scheme", "w4.yaml"], "defaults.weight.bits: checkpoint 8, model.scheme 4"),
    "network": (
        ["--model.network.voxel_size", "[0.64, 0.64, 0.16]"],
        "model.network.voxel_size: checkpoint (0.64, 0.64, 0.32), now (0.64, 0.64, 0.16)",
    ),
}


AS_IT_IS = ["--model.scheme", "null"]
"""The scheme of the checkpoint: int8.yaml, which the old configurations name, has other biases by now."""


@pytest.mark.parametrize("which", ["last", "file"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_setting_is_refused(
    name: str,
    which: str,
    run: Path,
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more, expected = DIFFERENCES[name]
    more = [_scheme(tmp_path) if value == "w4.yaml" else value for value in more]
    checkpoint = "last" if which == "last" else str(run / "checkpoints/last.ckpt")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    options = [*small_options(simulated_root, run, "qat"), "--trainer.max_epochs", "2"]
    error = fails(["fit", *options, *more, "--ckpt_path", checkpoint], capsys)
    assert expected in error
    assert "a run goes on as it began" in error
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_file_alone_goes_on(run: Path, simulated_root: Path, tmp_path: Path) -> None:
    """What the command does not say is taken from the checkpoint."""
    options = small_options(simulated_root, tmp_path / "again")  # of the float run: no arm, no scheme
    checkpoint = str(run / "checkpoints/last.ckpt")
    main(["fit", *options, "--trainer.max_epochs", "2", "--ckpt_path", checkpoint])
    content = torch.load(tmp_path / "again/checkpoints/last.ckpt", weights_only=True)
    assert content["quantization"]["arm"] == "qat"
    saved = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert saved["model"]["arm"] == "qat"


@pytest.mark.parametrize("which", ["last", "file"])
def test_what_a_refusal_says_to_type_works(
    which: str, run: Path, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scheme file that the run began with says something else by now."""
    checkpoint = "last" if which == "last" else str(run / "checkpoints/last.ckpt")
    folder = run if which == "last" else tmp_path / "again"
    options = ["fit", *small_options(simulated_root, folder, "qat"), "--trainer.max_epochs", "2"]
    options += ["--ckpt_path", checkpoint]
    error = fails(options, capsys)
    assert "defaults.bias: checkpoint float, model.scheme accumulator" in error
    assert error.endswith(f"to go on as the checkpoint is: {' '.join(AS_IT_IS)}")
    main([*options, *AS_IT_IS])
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 6
    assert {row["bias"] for row in content["quantization"]["layers"].values()} == {"float"}
    options = ["fit", *small_options(simulated_root, folder, "qat"), "--trainer.max_epochs", "3"]
    main([*options, "--ckpt_path", "last", *AS_IT_IS])  # and again


def test_the_scheme_is_compared_where_its_file_is_there(
    run: Path, simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A file of the same path with other content is another scheme; without the file it is the run's own."""
    monkeypatch.chdir(tmp_path)
    file = Path("configs/schemes/int8.yaml")
    file.parent.mkdir(parents=True)
    shutil.copy(_scheme(tmp_path), file)
    options = [*small_options(simulated_root, run, "qat"), "--trainer.max_epochs", "2"]
    error = fails(["fit", *options, "--ckpt_path", "last"], capsys)
    assert "defaults.weight.bits: checkpoint 8, model.scheme 4" in error
    file.unlink()
    main(["fit", *options, "--ckpt_path", "last"])
    assert fails(["fit", *options, "--model.scheme", "other.yaml", "--ckpt_path", "last"], capsys).endswith(
        "scheme file 'other.yaml' does not exist"
    )


def test_nan_in_the_optimizer_is_refused(
    run: Path, simulated_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(CHECKPOINTS["qat"], weights_only=True)
    content["optimizer_states"][0]["state"][3]["exp_avg"].view(-1)[0] = torch.nan
    torch.save(content, run / "checkpoints/last.ckpt")
    options = [*small_options(simulated_root, run, "qat"), "--trainer.max_epochs", "2", *AS_IT_IS]
    error = fails(["fit", *options, "--ckpt_path", "last"], capsys)
    assert "1 tensors hold NaN or infinite numbers: optimizer.3.exp_avg (1 of" in error


def test_a_checkpoint_that_no_fit_wrote(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `convert` writes them: scored from `--ckpt_path` like any other, and nothing to go on from."""
    content = torch.load(CHECKPOINTS["float"], weights_only=True)
    kept = ("state_dict", "quantization", "hyper_parameters")
    torch.save({key: content[key] for key in kept}, tmp_path / "converted.ckpt")
    options = [
        *small_options(simulated_root, tmp_path / "run"),
        "--ckpt_path",
        str(tmp_path / "converted.ckpt"),
    ]
    main(["validate", *options])
    assert (tmp_path / "run/metrics.json").is_file()
    error = fails(["fit", *options], capsys)
    assert "holds no state of training to go on from; a fit starts from it as model.weights" in error


def test_one_option_of_a_group_asks_for_no_other(simulated_root: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((SCHEMA_1 / "learned/config.yaml").read_text())
    del content["model"]["ranges"], content["model"]["network"]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    options = ["-c", str(tmp_path / "c.yaml"), *small_options(simulated_root, tmp_path / "again")[2:]]
    options += ["--ckpt_path", str(CHECKPOINTS["learned"]), "--trainer.max_epochs", "3"]
    more = ["--model.ranges.every_num_steps", "10", "--model.network.head_channels", "8"]
    main(["fit", *options, *more, *AS_IT_IS])
    content = torch.load(tmp_path / "again/checkpoints/last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["ranges"]["amax"] == "learned"


def test_classes_in_another_order_are_another_network(
    run: Path, simulated_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files from before `class_names` have the default."""
    names = ["bicycle", "car", "motorcycle"]
    options = [*small_options(simulated_root, run, "qat"), "--model.network.class_names", str(names)]
    error = fails(["fit", *options, "--ckpt_path", "last"], capsys)
    assert "model.network.class_names: checkpoint ('car', 'truck'" in error
