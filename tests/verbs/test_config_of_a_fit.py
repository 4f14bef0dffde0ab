"""The config.yaml of a fit feeds our own verbs, though it holds keys that mean nothing to them."""

from pathlib import Path

import pytest
import yaml
from command_line import fails

from cpq_train.verbs.cli import main

OWN_VERBS = ["calibrate", "sensitivity", "profile"]


def _options(verb: str, arms: dict[str, Path], folder: Path) -> list[str]:
    weights = ["--model.weights", str(arms["float"] / "checkpoints/last.ckpt")]
    output = ["--output", str(folder / "out"), "--trainer.default_root_dir", str(folder / "run")]
    return [verb, "-c", str(arms["qat"] / "config.yaml"), *weights, *output]


def test_feeds_calibrate(arms: dict[str, Path], tmp_path: Path) -> None:
    config = yaml.safe_load((arms["qat"] / "config.yaml").read_text())
    assert {"ckpt_path", "weights_only"} <= config.keys()
    main(_options("calibrate", arms, tmp_path))
    assert (tmp_path / "out").is_file()


def test_feeds_profile(arms: dict[str, Path], tmp_path: Path) -> None:
    main([*_options("profile", arms, tmp_path), "--num_passes", "1"])
    assert (tmp_path / "out/profile.json").is_file()


def test_feeds_sensitivity(arms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as its own first check: it runs for minutes."""
    error = fails([*_options("sensitivity", arms, tmp_path), "--num_samples", "0"], capsys)
    assert "--num_samples is 0: expected 1 to data.num_calibration_samples" in error


@pytest.mark.parametrize("verb", OWN_VERBS)
def test_refuses_a_checkpoint(
    verb: str, arms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails([*_options(verb, arms, tmp_path), "--ckpt_path", "best"], capsys)
    origin = {"profile": "takes its network from model.weights or a list of checkpoints"}
    says = origin.get(verb, "starts from model.weights, a float checkpoint")
    assert f"{verb} {says}, not from --ckpt_path" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", OWN_VERBS)
def test_help_keeps_quiet_about_them(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert "--output" in out
    assert "--ckpt_path CKPT_PATH" not in out
