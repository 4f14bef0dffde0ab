"""The verb verify on a tiny calibrated checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import fails

from cpq_train.arms.structure import build
from cpq_train.models import NetworkConfig
from cpq_train.quantization.layers import residual
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantized_layers
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

TINY = NetworkConfig(
    voxel_size=(0.8, 0.8, 0.32),
    backbone_3d_channels=(8, 8, 8, 8),
    backbone_3d_num_blocks=(1, 1, 1, 1),
    backbone_3d_out_channels=8,
    backbone_2d_num_layers=(1, 1),
    backbone_2d_channels=(8, 8),
    upsample_channels=(8, 8),
    head_channels=8,
)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    points = rng.uniform([-50, -50, -3, 0, 0], [50, 50, 1, 255, 31], (20000, 5)).astype(np.float32)
    points[:, 4] = points[:, 4].round()
    path = tmp_path_factory.mktemp("cloud") / "cloud.bin"
    points.tofile(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    subject = build(TINY, "ptq", Scheme.from_file("configs/schemes/int8.yaml"))
    coords = torch.unique(torch.randint(0, 25, (3000, 3)), dim=0)
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    with collecting_ranges(subject.network):
        subject.network(torch.randn(len(coords), 5) * 20, coords, 1)
    path = tmp_path_factory.mktemp("checkpoint") / "ptq.ckpt"
    _save(path, subject.network.state_dict(), subject.describe())
    return path


def _save(path: Path, state: dict[str, Any], description: dict[str, Any]) -> None:
    content = {
        "state_dict": {f"network.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": dict(CenterPointDetector(TINY).hparams),
        "quantization": description,
    }
    torch.save(content, path)


def test_a_good_checkpoint_passes(
    checkpoint: Path, cloud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(checkpoint), "--cloud", str(cloud), str(cloud), "--output", str(tmp_path / "v.json")])
    out = " ".join(capsys.readouterr().out.split())
    assert "0 differ by one step and 0 by more" in out
    document = json.loads((tmp_path / "v.json").read_text())
    assert document["failures"] == []
    rows = {row["name"]: row for row in document["layers"]}
    assert len(rows) == 12 + 4 + (4 + 1 + 36 * 2) + 2
    assert rows["backbone_2d.deblocks.0.0"]["num_sums"] == 2 * 8 * 16 * 16  # two clouds
    assert not any(row["not_covered"] for row in rows.values())
    assert document["end_to_end"]["num_outputs"] == 2 * 16 * 16 * (6 * 10 + 10)
    assert document["num_detections"] > 0


def test_a_data_root_and_simulated_key_frames(
    checkpoint: Path, simulated_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(simulated_root), "--num_sweeps", "1"]
    main(["verify", str(checkpoint), *root, "--num_samples", "2"])
    main(["verify", str(checkpoint), "--num_sweeps", "2"])
    assert capsys.readouterr().out.count("0 differ by one step and 0 by more") == 2
    error = fails(["verify", str(checkpoint), *root, "--num_samples", "5"], capsys)
    assert "num_samples is 5" in error
    assert "has 4 for validation" in error


def test_layers_that_compute_something_else_fail(
    checkpoint: Path,
    cloud: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add, added = residual.add_codes, residual.added
    monkeypatch.setattr(residual, "add_codes", lambda *codes_and_steps: add(*codes_and_steps) * 1.01)
    monkeypatch.setattr(residual, "added", lambda *a, **k: (added(*a, **k)[0] * 1.01, None))
    output = tmp_path / "v.json"
    error = fails(["verify", str(checkpoint), "--cloud", str(cloud), "--output", str(output)], capsys)
    assert "4 layers differ from the integer reference: backbone_3d.conv1.0.quant_add, " in error
    assert "codes flipped against the integer reference; max_flipped_share is 0.0001" in error
    assert "detections differ" in error
    document = json.loads(output.read_text())
    assert len(document["failures"]) >= 3
    assert next(iter(document["end_to_end"]["by_layer"])) == "backbone_3d.conv2.0.0"
    wrong = next(row for row in document["layers"] if row["mismatched_outputs"])
    assert wrong["name"] == "backbone_3d.conv1.0.quant_add"
    assert wrong["where"].startswith("index (")


def test_bad_arguments(
    checkpoint: Path, cloud: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify = ["verify", str(checkpoint)]
    assert "no.bin cannot be read" in fails([*verify, "--cloud", str(tmp_path / "no.bin")], capsys)
    assert "expected one of them" in fails([*verify, "--cloud", str(cloud), "--root", str(tmp_path)], capsys)
    assert "max_flipped_share is 2.0" in fails([*verify, "--max_flipped_share", "2"], capsys)
    assert "num_samples is 0" in fails([*verify, "--num_samples", "0"], capsys)


def test_no_gpu(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = fails(["verify", str(checkpoint), "--device", "cuda"], capsys)
    assert "device is 'cuda', and this machine has no CUDA device; accepted: cpu" in error


@pytest.mark.cuda
def test_on_a_gpu(checkpoint: Path, cloud: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(checkpoint), "--cloud", str(cloud), "--device", "cuda"])
    assert " and 0 by more; " in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_without_integer_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = build(TINY, "float", None)
    _save(tmp_path / "float.ckpt", subject.network.state_dict(), subject.describe())
    error = fails(["verify", str(tmp_path / "float.ckpt")], capsys)
    assert "arm 'float', has no integer layer: nothing to verify" in error


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("scheme", ["int8", "w4a4", "mixed"])
def test_schemes_equal_the_integer_reference(scheme: str, device: str) -> None:
    """On CUDA sums come in another order, and a kernel that is no plain sum of products would show."""
    torch.manual_seed(0)
    network = build(TINY, "ptq", Scheme.from_file(f"configs/schemes/{scheme}.yaml")).network.to(device)
    coords = torch.unique(torch.randint(0, 25, (2000, 3)), dim=0)
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    inputs = ((torch.randn(len(coords), 5) * 20).to(device), coords.to(device), 1)
    with collecting_ranges(network):
        network(*inputs)
    reports = verify_layers(network, inputs)
    assert len(reports) == len(quantized_layers(network))
    assert [report for report in reports if report.num_mismatched or report.not_covered] == []
