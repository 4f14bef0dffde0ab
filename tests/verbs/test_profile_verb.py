"""The verb `profile` as a user runs it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.data.clouds import synthetic_cloud
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.models import CenterPoint
from cpq_train.verbs.cli import main


def _profile(run: Path, *more: str, root: Path | str = "nowhere") -> list[str]:
    return ["profile", "-c", BASE, *tiny_options(Path(root), run), "--num_passes", "1", *more]


def _fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_synthetic_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No data and no checkpoint: tables on the console, and files with every row."""
    output = tmp_path / "profile"
    main(_profile(tmp_path, "--output", str(output), "--trace", "true"))
    out = capsys.readouterr().out
    for text in ("CenterPoint(", "Storage by module", "Memory by layer", "Latency by layer", "unattributed"):
        assert text in out
    document = json.loads((output / "profile.json").read_text())
    summary = document["summary"]
    layers = {row["name"]: row for row in document["latency"]["layers"]}
    for name in (
        *("backbone_3d.conv_input.0:rulebook", "map_to_bev_module"),
        *("backbone_2d.concatenation", "decode", "NMS", "backbone_3d.conv4.1.conv1"),
    ):
        assert layers[name]["ms"] > 0
    latency = document["latency"]
    rows_ms = sum(row["ms"] for row in layers.values())
    assert rows_ms + latency["unattributed"]["ms"] == pytest.approx(latency["whole"]["ms"])
    assert sum(row["ms"] for row in latency["kinds"]) == pytest.approx(rows_ms)
    assert summary["num_macs"] == sum(row["macs"] for row in layers.values()) > 1e6
    assert summary["input"] == "synthetic"
    assert 0 < summary["saved_bytes"] < summary["training_peak_bytes"]
    assert len(_csv(output / "latency.csv")) == len(layers)
    assert len(_csv(output / "memory.csv")) == len(document["memory"])
    assert len(_csv(output / "storage.csv")) == len(document["storage"])
    assert (output / "modules.txt").read_text().startswith("CenterPoint(")
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "backbone_2d.concatenation (Concatenation)" for event in events)


def test_a_sample_and_a_quantized_network(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "profile"
    weights = ("--model.weights", str(arms["ptq"] / "ptq.ckpt"))
    sample = ("--sample", "first", "--output", str(output))
    main(_profile(tmp_path, "-c", OVERLAY, *weights, *sample, root=simulated_root))
    document = json.loads((output / "profile.json").read_text())
    summary = document["summary"]
    assert (summary["arm"], summary["scheme"]) == ("qat", "int8")
    assert summary["ranges_from_this_input"] is False
    kinds = {row["name"]: row["parts"] for row in document["latency"]["kinds"]}
    assert (kinds["QuantConv2d"], kinds["QuantSubMConv3d"], kinds["SubMConv3d"]) == (85, 16, 1)
    # Weights have 8 bits; biases, ranges and the first layer 32.
    assert 0.25 < summary["stored_bytes"] / summary["float_bytes"] < 0.35
    memory = {row["name"]: row for row in document["memory"]}
    assert memory["backbone_3d.conv2.1.conv1"]["saved_bytes"] > 0


def test_a_scheme_without_a_checkpoint(tmp_path: Path) -> None:
    """Sizes at the bits of a scheme need no weights; the ranges come from the input."""
    output = tmp_path / "profile"
    cloud = tmp_path / "cloud.bin"
    synthetic_cloud(num_sweeps=1, seed=0).tofile(cloud)
    main(_profile(tmp_path, "-c", OVERLAY, "--cloud", str(cloud), "--output", str(output)))
    summary = json.loads((output / "profile.json").read_text())["summary"]
    assert (summary["ranges_from_this_input"], summary["weights"]) == (True, "untrained")
    assert summary["input"] == str(cloud)
    assert summary["num_points"] == cloud.stat().st_size // 20


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    main(_profile(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "first", "--cloud", "a.bin"], "--sample first and --cloud a.bin are both given"),
        (["--num_passes", "0"], "--num_passes is 0: expected 1 or more"),
        (["--trace", "true"], "--trace needs --output"),
        (["--cloud", "nothing.bin"], "cloud nothing.bin cannot be read"),
        (["--sample", "first"], "nowhere"),
        (["--ckpt_path", "best"], "profile takes its network from model.weights"),
    ],
)
def test_bad_input(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile"
    arguments = options if "--trace" in options else [*options, "--output", str(output)]
    assert message in _fails(_profile(tmp_path, *arguments), capsys)
    assert not output.exists()


def test_an_unknown_sample(simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _fails(_profile(tmp_path, "--sample", "abc", root=simulated_root), capsys)
    assert "sample token 'abc' is not one of the 10 samples" in message


def test_synthetic_clouds_repeat_and_look_like_lidar() -> None:
    cloud = synthetic_cloud(num_sweeps=10, seed=0)
    assert np.array_equal(cloud, synthetic_cloud(num_sweeps=10, seed=0))
    assert cloud.dtype == np.float32
    assert 250_000 < len(cloud) < 350_000
    assert set(np.unique(cloud[:, 4])) == {np.float32(0.05 * sweep) for sweep in range(10)}


def test_concatenation_adds_no_state() -> None:
    assert not [name for name in CenterPoint().state_dict() if "concatenation" in name]
    joined = CenterPoint().backbone_2d.concatenation([torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 3, 3)])
    assert joined.shape == (1, 3, 3, 3)


def test_a_scored_run_gets_its_measurements(arms: dict[str, Path], tmp_path: Path) -> None:
    """Those of the checkpoint that was scored, and of no other."""
    run = tmp_path / "run"
    shutil.copytree(arms["float"], run)
    before = read_metrics(run / "metrics.json")
    for weights, is_its_own in (
        (arms["float_tuned"] / "checkpoints/last.ckpt", False),
        (run / "checkpoints/last.ckpt", True),
    ):
        main(_profile(tmp_path, "--model.weights", str(weights), "--output", str(run)))
        after = read_metrics(run / "metrics.json")
        assert ("latency_ms" in after["profile"]) == is_its_own
        assert {**after, "profile": None} == {**before, "profile": None}
        assert before["profile"].items() <= after["profile"].items()
