"""Policies of ranges and of BatchNorm through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import fails
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.common.kernels import HAS_BF16
from cpq_train.verbs.cli import main

State = dict[str, torch.Tensor]


def _fit(root: Path, run: Path, weights: Path, *more: str) -> dict[str, object]:
    main(["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(root, run), "--model.weights", str(weights), *more])
    return _read(run / "checkpoints/last.ckpt")


def _read(checkpoint: Path) -> dict[str, object]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def test_resume_with_learned_ranges_equals_uninterrupted(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    options = ["--model.ranges.amax", "learned", "--model.ranges.lr", "0.01", "--trainer.max_epochs", "2"]
    every_epoch = ("--checkpoint.save_top_k", "-1", "--checkpoint.every_n_epochs", "1")
    ptq = arms["ptq"] / "ptq.ckpt"
    whole = _fit(simulated_root, tmp_path / "whole", ptq, *options, *every_epoch)
    first = next((tmp_path / "whole/checkpoints").glob("epoch00*.ckpt"))
    resumed = _fit(simulated_root, tmp_path / "resumed", ptq, *options, "--ckpt_path", str(first))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    start = _read(ptq)["state_dict"]
    moved = [
        n for n, v in start.items() if n.endswith("_amax") and not torch.equal(v, whole["state_dict"][n])
    ]
    assert len(moved) > 0.9 * sum(n.endswith("_amax") for n in start)
    groups = whole["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert whole["quantization"]["layers"]["dense_head.shared_conv.0"]["input"]["amax"] == "learned"


def test_moving_ranges_move_and_stop(arms: dict[str, Path], simulated_root: Path, tmp_path: Path) -> None:
    ptq = arms["ptq"] / "ptq.ckpt"
    moving = ("--model.ranges.amax", "moving", "--model.ranges.every_num_steps", "1")
    states: list[State] = [
        _fit(simulated_root, tmp_path / n, ptq, *moving, "--model.ranges.num_moving_steps", n)["state_dict"]
        for n in ("0", "2")
    ]
    start = _read(ptq)["state_dict"]
    inputs = [n for n in start if n.endswith("_input_quantizer._amax")]
    assert all(torch.equal(start[n], states[0][n]) for n in inputs)
    assert all(not torch.equal(start[n], states[1][n]) for n in inputs)


@pytest.mark.parametrize("policy", ["learned", "moving"])
def test_two_ranks_keep_equal_ranges(
    policy: str, arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    """A fit ends with an error if they do not."""
    ptq, run = arms["ptq"] / "ptq.ckpt", tmp_path / "run"
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    options = ["--model.ranges.amax", policy, "--model.ranges.every_num_steps", "1", "--data.batch_size", "1"]
    command = ["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(simulated_root, run), *options, *ranks]
    subprocess.run(
        [sys.executable, "-m", "cpq_train", *command, "--model.weights", str(ptq)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    start, end = (_read(file)["state_dict"] for file in (ptq, run / "checkpoints/last.ckpt"))
    assert any(
        not torch.equal(start[name], end[name]) for name in start if name.endswith("input_quantizer._amax")
    )


@pytest.mark.parametrize("policy", ["frozen", "trained"])
def test_batchnorm_kept_is_folded_behind_training(
    policy: str, arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    weights = arms["float"] / "checkpoints/last.ckpt"
    run = tmp_path / "qat"
    kept = _fit(simulated_root, run, weights, "--model.batchnorm", policy)
    folded = _read(run / "checkpoints/folded.ckpt")
    assert kept["quantization"]["batchnorm"] == policy
    assert folded["quantization"]["batchnorm"] == "folded"
    assert not any("running_mean" in name for name in folded["state_dict"])
    name = "network.backbone_2d.blocks.0.2.running_mean"
    has_moved = not torch.equal(kept["state_dict"][name], _read(weights)["state_dict"][name])
    assert has_moved == (policy == "trained")


def test_a_folded_batchnorm_cannot_be_trained(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _fit(simulated_root, tmp_path / "q", arms["ptq"] / "ptq.ckpt", "--model.batchnorm", "trained")
    assert "is folded; accepted: folded" in " ".join(capsys.readouterr().err.split())


def test_averaged_weights_are_scored_with_averaged_ranges(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    """The average takes the place of the weights by writes that torch does not count."""
    run = tmp_path / "run"
    averaging = "lightning.pytorch.callbacks.EMAWeightAveraging"
    moving = ("--model.ranges.amax", "moving", "--model.ranges.every_num_steps", "1")
    options = (*moving, "--model.ranges.momentum", "1.0")
    averaged = (f"--trainer.callbacks+={averaging}", "--trainer.callbacks.decay", "0.5")
    _fit(simulated_root, run, arms["ptq"] / "ptq.ckpt", *options, *averaged)
    main(
        [
            *("validate", "-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")),
            *("--trainer.default_root_dir", str(tmp_path / "again"), "--trainer.callbacks", "null"),
        ]
    )
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "again")]
    assert scores[0]["metrics"] == scores[1]["metrics"]
    assert (run / "results_nusc.json").read_text() == (tmp_path / "again/results_nusc.json").read_text()


@pytest.mark.skipif(not HAS_BF16, reason="this CPU multiplies no bf16")
def test_gradients_in_bf16_are_those_of_qat(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ptq, asked = arms["ptq"] / "ptq.ckpt", ("--model.gradients", "bf16")
    saved = _fit(simulated_root, tmp_path / "qat", ptq, *asked)
    assert saved["hyper_parameters"]["gradients"] == "bf16"
    plain = _read(arms["qat"] / "checkpoints/last.ckpt")
    name = "network.dense_head.shared_conv.0.weight"
    change, of_fp32 = (one["state_dict"][name] - _read(ptq)["state_dict"][name] for one in (saved, plain))
    assert not torch.equal(change, of_fp32)
    assert float((change - of_fp32).norm() / of_fp32.norm()) < 0.2
    options = [*tiny_options(simulated_root, tmp_path / "c"), *asked, "--model.arm", "float_tuned"]
    weights = str(arms["float"] / "checkpoints/last.ckpt")
    error = fails(["fit", "-c", BASE, *options, "--model.weights", weights], capsys)
    assert "model.gradients is 'bf16', which quantized layers have, and model.arm is 'float_tuned'" in error
