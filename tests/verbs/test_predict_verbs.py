"""`test` and `predict`: the detections of `validate`, without annotations, from tokens and bare files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import fails
from nuscenes import NuScenes
from pyquaternion import Quaternion
from tiny_model import BASE, tiny_options

from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.verbs.cli import main

Run = dict[str, Path]


@pytest.fixture(scope="module")
def bare_root(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set as the official server's test split comes: without annotations."""
    root = tmp_path_factory.mktemp("bare") / "root"
    shutil.copytree(simulated_root, root, ignore=shutil.ignore_patterns(".cpq_train"))
    for table in ("sample_annotation", "instance"):
        (root / "v1.0-trainval" / f"{table}.json").write_text("[]")
    return root


def _verb(verb: str, root: Path, run: Path, weights: Path, *more: str) -> list[str]:
    options = tiny_options(root, run)
    return [verb, "-c", BASE, *options, "--model.weights", str(weights), *more]


def _results(path: Path) -> dict[str, list[dict[str, Any]]]:
    return dict(json.loads(path.read_text())["results"])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_submission_without_annotations(num_ranks: int, arms: Run, bare_root: Path, tmp_path: Path) -> None:
    """It is what `validate` wrote with them, sample by sample, and from uneven ranks too."""
    options = _verb("test", bare_root, tmp_path, arms["ptq"] / "ptq.ckpt", "--data.test_split", "val")
    options += ["--data.batch_size", "1"]
    if num_ranks == 1:
        main(options)
    else:
        ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "cpq_train", *options, *ranks]
        subprocess.run(command, env={**os.environ, **threads}, check=True, timeout=300)
    found = _results(tmp_path / "results_nusc.json")
    assert found == _results(arms["ptq"] / "results_nusc.json")
    assert len(found) == 4
    assert all(0 < len(boxes) <= 500 for boxes in found.values())
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("verb", "file"), [("validate", "results_nusc.json"), ("predict", "predictions.json")]
)
def test_the_order_of_class_names_changes_nothing(
    verb: str, file: str, arms: Run, simulated_root: Path, tmp_path: Path
) -> None:
    expected = _results(arms["ptq"] / "results_nusc.json")
    options = [f"--model.network.class_names={json.dumps(DETECTION_CLASSES[::-1])}"]
    options += [f"--data.sample_tokens={json.dumps(list(expected))}"] if verb == "predict" else []
    main(_verb(verb, simulated_root, tmp_path, arms["ptq"] / "ptq.ckpt", *options))
    assert _results(tmp_path / file) == expected
    if verb == "validate":
        one, two = (json.loads((run / "metrics.json").read_text()) for run in (arms["ptq"], tmp_path))
        assert one["per_class"] == two["per_class"]
        with np.load(arms["ptq"] / "bev_sample.npz") as one, np.load(tmp_path / "bev_sample.npz") as two:
            for name in one.files:
                np.testing.assert_array_equal(one[name], two[name])


def test_class_names_that_nuscenes_does_not_have(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"--model.network.class_{key}" for key in ("names=[tram,car]", "groups=[[tram],[car]]")]
    error = fails(_verb("test", simulated_root, tmp_path, arms["ptq"] / "ptq.ckpt", *names), capsys)
    assert "class_names names 'tram': accepted with nuScenes data are car, truck" in error


def test_a_scored_run_keeps_its_submission(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (arms["ptq"] / "results_nusc.json").read_bytes()
    options = _verb(
        "test", simulated_root, arms["ptq"], arms["ptq"] / "ptq.ckpt", "--data.test_split", "train"
    )
    error = fails(options, capsys)
    assert "holds the scores of split 'val'" in error
    assert "give another --trainer.default_root_dir" in error
    assert (arms["ptq"] / "results_nusc.json").read_bytes() == before


def test_predict_samples(arms: Run, bare_root: Path, tmp_path: Path) -> None:
    expected = _results(arms["ptq"] / "results_nusc.json")
    tokens = list(expected)[2:0:-1]
    weights = arms["ptq"] / "ptq.ckpt"
    main(_verb("predict", bare_root, tmp_path, weights, "--data.sample_tokens", json.dumps(tokens)))
    found = _results(tmp_path / "predictions.json")
    assert found == {token: expected[token] for token in tokens}
    assert json.loads((tmp_path / "predictions.json").read_text())["meta"]["frame"] == "global"
    assert sorted(p.name for p in (tmp_path / "bev").iterdir()) == sorted(f"{token}.png" for token in tokens)


def test_predict_clouds_without_a_data_root(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    """Boxes of a bare key frame, moved by the devkit's poses, are those of the sample with one sweep."""
    weights = arms["float"] / "checkpoints/last.ckpt"
    token = next(iter(_results(arms["float"] / "results_nusc.json")))
    nusc = NuScenes("v1.0-trainval", str(simulated_root), verbose=False)
    frame = nusc.get("sample_data", nusc.get("sample", token)["data"]["LIDAR_TOP"])
    cloud = simulated_root / frame["filename"]
    # Voxels hold all their points, whose order then does not matter.
    sizes = ["--data.max_points_per_voxel", "2000", "--data.num_sweeps", "1"]

    options = _verb("predict", simulated_root, tmp_path / "clouds", weights, *sizes)
    main([*options, "--data.root", "null", "--clouds", str(cloud), str(cloud)])
    in_lidar = _results(tmp_path / "clouds/predictions.json")
    main(
        _verb(
            "predict",
            simulated_root,
            tmp_path / "tokens",
            weights,
            *sizes,
            "--data.sample_tokens",
            f"[{token}]",
        )
    )
    in_world = _results(tmp_path / "tokens/predictions.json")[token]

    boxes = in_lidar[str(cloud)]
    assert len(boxes) == len(in_world) > 5
    poses = [nusc.get(table, frame[f"{table}_token"]) for table in ("calibrated_sensor", "ego_pose")]
    for box, expected in zip(boxes[:20], in_world[:20], strict=True):
        centre = np.array(box["translation"])
        for pose in poses:
            centre = Quaternion(pose["rotation"]).rotation_matrix @ centre + pose["translation"]
        np.testing.assert_allclose(centre, expected["translation"], atol=1e-2)
        assert box["detection_name"] == expected["detection_name"]
        assert box["detection_score"] == pytest.approx(expected["detection_score"], abs=1e-3)
    assert json.loads((tmp_path / "clouds/predictions.json").read_text())["meta"]["frame"] == "LIDAR_TOP"
    stem = cloud.name.removesuffix(".pcd.bin")
    assert sorted(p.name for p in (tmp_path / "clouds/bev").iterdir()) == [f"0_{stem}.png", f"1_{stem}.png"]


def test_predict_a_part_of_the_clouds(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    clouds = [str(cloud) for cloud in sorted((simulated_root / "samples/LIDAR_TOP").iterdir())[:2]]
    options = _verb("predict", simulated_root, tmp_path, arms["float"] / "checkpoints/last.ckpt")
    few = ["--data.batch_size", "1", "--trainer.limit_predict_batches", "1"]
    main([*options, *few, "--clouds", *clouds])
    assert list(_results(tmp_path / "predictions.json")) == clouds[:1]
    assert len(list((tmp_path / "bev").iterdir())) == 1


def test_bad_clouds(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _verb("predict", simulated_root, tmp_path, arms["float"] / "checkpoints/last.ckpt", "--clouds")
    assert "absent.bin cannot be read" in fails([*options, str(tmp_path / "absent.bin")], capsys)
    (tmp_path / "short.bin").write_bytes(b"123")
    assert "short.bin is truncated: 3 bytes" in fails([*options, str(tmp_path / "short.bin")], capsys)
    np.full((4, 5), np.nan, np.float32).tofile(tmp_path / "nan.bin")
    assert "nan.bin holds NaN" in fails([*options, str(tmp_path / "nan.bin")], capsys)
    assert not (tmp_path / "predictions.json").exists()


def test_bad_requests(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = arms["float"] / "checkpoints/last.ckpt"
    for verb in ("test", "predict"):
        options = [verb, "-c", BASE, *tiny_options(simulated_root, tmp_path)]
        assert f"{verb} needs model.weights, --ckpt_path" in fails(
            [*options, "--data.test_split", "val"], capsys
        )
        assert "split 'test' holds no scene" in fails(_verb(verb, simulated_root, tmp_path, weights), capsys)
    options = _verb("test", simulated_root, tmp_path, weights, "--data.root", "null")
    assert "data.root is not given" in fails(options, capsys)
    twice = json.dumps(list(_results(arms["float"] / "results_nusc.json"))[:1] * 2)
    options = _verb("predict", simulated_root, tmp_path, weights, "--data.sample_tokens", twice)
    assert "2 samples, 1 different ones" in fails(options, capsys)
