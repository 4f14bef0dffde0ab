"""Clouds of other columns and file types, through the verbs: the network follows, and checkpoints say so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from own_roots import FOUR, SIX, nuscenes_points, own_columns, pcd, rewritten, six_columns_in_pcd
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.models import NetworkConfig
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main
from cpq_train.verbs.trainer import QuantTrainer

THREE = ("x", "y", "z")


@pytest.fixture(scope="module")
def bare_root(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw x, y, z and nothing else."""
    return rewritten(simulated_root, tmp_path_factory.mktemp("three") / "root", THREE)


@pytest.fixture(scope="module")
def runs(bare_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float network and its PTQ checkpoint on x, y, z; only the first command says what the columns are."""
    folder = tmp_path_factory.mktemp("runs")
    weights, ptq = folder / "float/checkpoints/last.ckpt", folder / "ptq/ptq.ckpt"
    main(["fit", "-c", BASE, *tiny_options(bare_root, folder / "float"), "--data.point_columns", "[x, y, z]"])
    tune = ["-c", BASE, "-c", OVERLAY, *tiny_options(bare_root, folder / "ptq")]
    main(["calibrate", *tune, "--model.weights", str(weights), "--output", str(ptq)])
    main(["validate", "-c", BASE, *tiny_options(bare_root, folder / "ptq"), "--model.weights", str(ptq)])
    return {"float": weights, "ptq": ptq, "folder": folder}


def _predict(weights: Path, root: Path, run: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    main(["predict", "-c", BASE, *tiny_options(root, run), "--model.weights", str(weights), *more])
    return dict(json.loads((run / "predictions.json").read_text())["results"])


def test_the_network_follows_the_columns(runs: dict[str, Path]) -> None:
    content = torch.load(runs["float"], weights_only=True)
    assert content["hyper_parameters"]["network"]["num_point_features"] == 4
    saved = yaml.safe_load((runs["folder"] / "float/config.yaml").read_text())
    assert saved["model"]["network"]["num_point_features"] == 4
    assert saved["data"]["point_columns"] == list(THREE)


def test_a_checkpoint_says_its_columns_and_they_are_taken(runs: dict[str, Path]) -> None:
    content = torch.load(runs["ptq"], weights_only=True)
    assert content["data"]["point_columns"] == THREE
    assert content["hyper_parameters"]["network"]["num_point_features"] == 4
    metrics = json.loads((runs["folder"] / "ptq/metrics.json").read_text())
    assert metrics["config"]["network"]["num_point_features"] == 4


def test_a_run_of_other_columns_is_resumed(runs: dict[str, Path], bare_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["fit", "-c", BASE, *tiny_options(bare_root, run), "--data.point_columns", "[x, y, z]"]
    main([*options, "--trainer.max_steps", "1"])
    main([*options, "--ckpt_path", "last"])
    main(["validate", "-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    assert (run / "metrics.json").is_file()


@pytest.mark.parametrize("ending", [".bin", ".npy", ".pcd"])
def test_predict_on_files_of_any_type(
    runs: dict[str, Path], simulated_root: Path, bare_root: Path, tmp_path: Path, ending: str
) -> None:
    source = next(iter(sorted((simulated_root / "samples/LIDAR_TOP").iterdir())))
    points = own_columns(nuscenes_points(source), THREE)
    raw, cloud = tmp_path / "raw.bin", tmp_path / f"a{ending}"
    points.tofile(raw)
    if ending == ".npy":
        np.save(cloud, points)
    else:
        cloud.write_bytes(points.tobytes() if ending == ".bin" else pcd(points, THREE, "binary_compressed"))
    found = _predict(runs["float"], bare_root, tmp_path / "run", "--clouds", str(raw), str(cloud))
    of_raw, of_cloud = ([{**box, "sample_token": ""} for box in found[str(path)]] for path in (raw, cloud))
    assert of_cloud == of_raw != []
    names = sorted(path.name for path in (tmp_path / "run/bev").iterdir())
    assert names == ["0_raw.png", "1_a.png"]


def test_predict_refuses_a_cloud_of_other_columns(
    runs: dict[str, Path],
    bare_root: Path,
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cloud = tmp_path / "five.bin"
    source = next(iter((simulated_root / "samples/LIDAR_TOP").iterdir())).read_bytes()
    cloud.write_bytes(source[: len(source) // 60 * 60])
    options = ["predict", "-c", BASE, *tiny_options(bare_root, tmp_path / "run")]
    options += ["--model.weights", str(runs["float"]), "--clouds", str(cloud)]
    error = fails(options, capsys)
    assert "five.bin holds mixed columns in points of 12 bytes, read by data.point_columns [x, y, z]" in error
    assert "; data.point_columns [x, y, z, intensity, ring] would fit" in error
    assert not (tmp_path / "run/predictions.json").exists()


def test_a_number_of_features_that_is_another_is_refused(
    bare_root: Path,
    simulated_root: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = ["fit", "-c", BASE, *tiny_options(bare_root, tmp_path / "run"), "--data.point_columns", "[x, y, z]"]
    error = fails([*fit, "--model.network.num_point_features", "5"], capsys)
    assert (
        "model.network.num_point_features is 5, and data.point_columns [x, y, z] give 4 features "
        "(x, y, z, time_lag): expected the same number" in error
    )
    main([*fit, "--model.network.num_point_features", "4", "--trainer.fast_dev_run", "1"])
    other = ["validate", "-c", BASE, *tiny_options(simulated_root, tmp_path / "other")]
    usual = ["--data.point_columns", "[x, y, z, intensity, ring]"]
    error = fails([*other, *usual, "--ckpt_path", str(runs["float"])], capsys)
    assert "model.network.num_point_features is 4, and data.point_columns [x, y, z, intensity, ring]" in error
    error = fails([*other, *usual, "--model.weights", str(runs["float"])], capsys)
    assert "conv_input" in error  # tensors of another shape, by name


def test_a_detector_and_data_made_in_python_are_compared(simulated_root: Path, tmp_path: Path) -> None:
    network = NetworkConfig(num_point_features=4)
    data = NuScenesDataModule(str(simulated_root), num_workers=0)
    trainer = QuantTrainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, enable_checkpointing=False
    )
    with pytest.raises(UserError, match=r"num_point_features is 4, and data.point_columns \[x, .* give 5"):
        trainer.fit(CenterPointDetector(network), data)


def test_verify_reads_clouds_as_the_checkpoint_says(
    runs: dict[str, Path], bare_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = next(iter((bare_root / "samples/LIDAR_TOP").iterdir()))
    main(["verify", str(runs["ptq"]), "--cloud", str(cloud)])
    main(["verify", str(runs["ptq"]), "--root", str(bare_root)])
    error = fails(["verify", str(runs["ptq"])], capsys)
    assert "was made with data.point_columns [x, y, z], which simulated samples do not have" in error
    assert "give --cloud FILE or --root DIR" in error


def test_profile_makes_up_what_the_network_sees(
    runs: dict[str, Path], bare_root: Path, tmp_path: Path
) -> None:
    cloud = next(iter((bare_root / "samples/LIDAR_TOP").iterdir()))
    for number, more in enumerate(([], ["--cloud", str(cloud)], ["--sample", "first"])):
        folder = tmp_path / str(number)
        options = ["profile", "-c", BASE, *tiny_options(bare_root, tmp_path / "run"), "--num_passes", "1"]
        main([*options, "--model.weights", str(runs["ptq"]), "--output", str(folder), *more])
        assert (folder / "profile.json").is_file()
    main(
        [
            "profile",
            str(runs["float"]),
            str(runs["ptq"]),
            "-c",
            BASE,
            "--num_passes",
            "1",
            "--cloud",
            str(cloud),
        ]
    )


def test_the_deployed_detector_reads_what_its_sidecar_says(
    runs: dict[str, Path], bare_root: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "net.onnx"
    main(["export", str(runs["ptq"]), "--output", str(engine), "--with_runtime"])
    sidecar = json.loads((tmp_path / "net.json").read_text())
    assert sidecar["data"]["point_columns"] == list(THREE)
    assert sidecar["inputs"][0]["meaning"] == "mean of the points of each voxel: x, y, z (m), time lag (s)"
    raw = sorted((bare_root / "samples/LIDAR_TOP").iterdir())[0]
    array = tmp_path / "a.npy"
    np.save(array, np.fromfile(raw, np.float32).reshape(-1, 3))
    runtime = [sys.executable, str(tmp_path / "deployed_detector.py"), str(engine)]
    output = tmp_path / "boxes.json"
    command = [*runtime, "--clouds", str(raw), str(array), "--output", str(output)]
    subprocess.run(command, check=True, timeout=300)
    found = json.loads(output.read_text())["results"]
    assert found[str(raw)] == found[str(array)] != []
    expected = _predict(runs["ptq"], bare_root, tmp_path / "run", "--data.root", "null", "--clouds", str(raw))
    assert len(expected[str(raw)]) == len(found[str(raw)])
    (tmp_path / "a.pcd").write_bytes(b"")
    done = subprocess.run(
        [*runtime, "--clouds", str(tmp_path / "a.pcd")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "a.pcd: a PCD file; accepted: .npy, and raw columns" in done.stderr


def test_six_columns_in_pcd_files_train_and_predict(simulated_root: Path, tmp_path: Path) -> None:
    root, run = six_columns_in_pcd(simulated_root, tmp_path / "root"), tmp_path / "run"
    columns = ["--data.point_columns", f"[{', '.join(SIX)}]"]
    main(["fit", "-c", BASE, *tiny_options(root, run), *columns])
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["network"]["num_point_features"] == 6
    cloud = next(iter((root / "samples/LIDAR_TOP").iterdir()))
    assert cloud.suffix == ".pcd"
    found = _predict(run / "checkpoints/last.ckpt", root, tmp_path / "p", "--clouds", str(cloud))
    assert list(found) == [str(cloud)]


def test_four_columns_score_as_the_root_that_they_are_of(
    arms: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    """nuScenes' features without the ring, which no network sees: the same submission."""
    root = rewritten(simulated_root, tmp_path / "root", FOUR)
    weights = str(arms["ptq"] / "ptq.ckpt")
    columns = ["--data.point_columns", f"[{', '.join(FOUR)}]"]
    main(
        ["validate", "-c", BASE, *tiny_options(root, tmp_path / "run"), "--model.weights", weights, *columns]
    )
    one, two = (
        json.loads((run / "results_nusc.json").read_text()) for run in (arms["ptq"], tmp_path / "run")
    )
    assert one["results"] == two["results"]


def test_a_bad_cloud_is_left_out_of_a_prediction(
    runs: dict[str, Path], bare_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = next(iter((bare_root / "samples/LIDAR_TOP").iterdir())), tmp_path / "bad.bin"
    bad.write_bytes(b"12345")
    clouds = ["--clouds", str(good), str(bad)]
    found = _predict(runs["float"], bare_root, tmp_path / "run", "--data.max_bad_sweeps", "0.5", *clouds)
    assert found[str(good)]
    assert list(found) == [str(good), str(bad)]
    assert "bad.bin is truncated: 5 bytes" in capsys.readouterr().err
    options = [
        "predict",
        "-c",
        BASE,
        *tiny_options(bare_root, tmp_path / "b"),
        "--data.max_bad_sweeps",
        "0.4",
    ]
    error = fails([*options, "--model.weights", str(runs["float"]), *clouds], capsys)
    assert "1 of the 2 sweeps cannot be used" in error
