"""A deployment file in the verbs: it scores, predicts, is verified and timed as its network is."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from command_line import fails
from exported_files import exported, forge, stating, take_away
from old_files import CHECKPOINTS, SCHEMA_1, small_options

from cpq_train.common.files import sha256_of
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.export.comparison import Probe
from cpq_train.profiling.latency_file import read_latency
from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")

FLOAT, PTQ = str(CHECKPOINTS["float"]), str(CHECKPOINTS["ptq"])
SAME_SCORES = (
    *("dataset", "metrics", "per_class", "per_range", "errors_per_range", "confidence"),
    *("postprocessing_sha256", "coverage"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stating(tmp_path_factory.mktemp("checkpoint"), "qat")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(checkpoint, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def scored(
    simulated_root: Path, checkpoint: Path, engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What runs -> the run that scored it."""
    runs = tmp_path_factory.mktemp("scored")
    for name, how in (("network", _weights(checkpoint)), ("engine", _engine(engine))):
        main(["validate", *small_options(simulated_root, runs / name), *how])
    return {name: runs / name for name in ("network", "engine")}


def _weights(file: Path | str) -> list[str]:
    return ["--model.weights", str(file)]


def _engine(file: Path | str) -> list[str]:
    return ["--model.engine_file", str(file)]


def _results(path: Path) -> dict[str, list[dict[str, Any]]]:
    return dict(json.loads(path.read_text())["results"])


def _plain(text: str) -> str:
    return " ".join(text.split())


# Scores


def test_scores_are_those_of_the_network(scored: dict[str, Path]) -> None:
    ours, theirs = (read_metrics(run / "metrics.json") for run in scored.values())
    assert {name: theirs[name] for name in SAME_SCORES} == {name: ours[name] for name in SAME_SCORES}
    files = [(run / "results_nusc.json").read_bytes() for run in scored.values()]
    assert files[0] == files[1]
    assert sum(map(len, _results(scored["engine"] / "results_nusc.json").values())) > 500
    for name in ("matches.npz", "bev_sample.npz"):
        with np.load(scored["network"] / name) as one, np.load(scored["engine"] / name) as two:
            assert one.files == two.files
            for array in one.files:
                np.testing.assert_array_equal(one[array], two[array])


def test_scores_say_what_was_run(scored: dict[str, Path], checkpoint: Path, engine: Path) -> None:
    import onnxruntime

    ours, theirs = (read_metrics(run / "metrics.json") for run in scored.values())
    assert (ours["arm"], theirs["arm"]) == ("qat", "deployed")
    assert "engine" not in ours
    assert theirs["engine"] == {
        "name": "onnxruntime",
        "version": onnxruntime.__version__,
        "target": "portable",
        "file": str(engine),
        "sha256": sha256_of(engine),
    }
    assert theirs["checkpoint"] == {"path": str(checkpoint), "sha256": sha256_of(checkpoint)}
    assert theirs["checkpoint"] == ours["checkpoint"]
    assert theirs["parents"] == {**ours["parents"], "qat": sha256_of(checkpoint)}
    assert theirs["parents"].keys() == {"float", "ptq", "qat"}
    assert theirs["profile"] == {"engine_file_bytes": engine.stat().st_size}
    assert theirs["config"]["engine_file"] == str(engine)


def test_scores_need_neither_onnx_nor_the_checkpoint(
    engine: Path, simulated_root: Path, scored: dict[str, Path], tmp_path: Path
) -> None:
    for file in (engine, engine.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    document = json.loads((tmp_path / "qat.json").read_text())
    document["checkpoint"]["path"] = "gone.ckpt"
    (tmp_path / "qat.json").write_text(json.dumps(document))
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(tmp_path / "qat.onnx")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        main(["validate", *options])
    found = read_metrics(tmp_path / "run/metrics.json")
    assert found["metrics"] == read_metrics(scored["engine"] / "metrics.json")["metrics"]
    assert found["checkpoint"]["path"] == "gone.ckpt"


def test_compare_has_a_row_of_it(
    scored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind all arms, against the float run that its checkpoint came from."""
    shutil.copytree(scored["engine"], tmp_path / "deployed")
    arms = [SCHEMA_1 / name for name in ("float", "ptq", "qat")]
    runs = [str(tmp_path / "deployed"), *map(str, arms)]
    main(["compare", *runs, "--output", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [run["arm"] for run in report["runs"]] == ["float", "ptq", "qat", "deployed"]
    baseline, *_, qat, deployed = report["runs"]
    for metric in ("mAP", "NDS"):
        gap = deployed["gap_to_float"][metric]
        assert gap["reason"] is None
        assert gap["value"] == deployed["metrics"][metric] - baseline["metrics"][metric]
        assert gap["interval"] == qat["gap_to_float"][metric]["interval"]
        assert deployed["ptq_loss_won_back"][metric]["reason"] == "only for the qat arm"
    assert deployed["coverage"] == qat["coverage"]
    assert deployed["lost_objects"] == qat["lost_objects"]
    lines = (tmp_path / "report/report.md").read_text().splitlines()
    scores = [line.split(" ")[1] for line in lines if line.startswith(("| float |", "| deployed |"))]
    assert scores[:2] == ["float", "deployed"]
    assert "deployed" in capsys.readouterr().out


def test_flipped_images(simulated_root: Path, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    found = []
    for name, how in (("network", _weights(checkpoint)), ("engine", _engine(engine))):
        options = small_options(simulated_root, tmp_path / name)
        main(["validate", *options, *how, "--model.test_time_flip", "true"])
        found.append((tmp_path / name / "results_nusc.json").read_bytes())
        assert "flip" not in name
    assert found[0] == found[1]
    hashes = {
        read_metrics(tmp_path / n / "metrics.json")["postprocessing_sha256"] for n in ("network", "engine")
    }
    assert len(hashes) == 1


def test_flipped_images_are_others(
    scored: dict[str, Path], simulated_root: Path, engine: Path, tmp_path: Path
) -> None:
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(engine)]
    main(["test", *options, "--data.test_split", "val", "--model.test_time_flip", "true"])
    assert _results(tmp_path / "run/results_nusc.json") != _results(scored["engine"] / "results_nusc.json")


def test_layer_probes_have_nothing_to_measure(
    scored: dict[str, Path], simulated_root: Path, engine: Path, tmp_path: Path
) -> None:
    """With the configuration of the fit, whose callbacks look at layers."""
    options = [*small_options(simulated_root, tmp_path / "run", "qat"), *_engine(engine)]
    main(["validate", *options, "--model.weights", "null"])
    assert not list((tmp_path / "run").glob("layer_*.csv"))
    found = read_metrics(tmp_path / "run/metrics.json")
    assert found["metrics"] == read_metrics(scored["engine"] / "metrics.json")["metrics"]


# Predictions


def test_a_submission(scored: dict[str, Path], simulated_root: Path, engine: Path, tmp_path: Path) -> None:
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(engine)]
    main(["test", *options, "--data.test_split", "val"])
    found = _results(tmp_path / "run/results_nusc.json")
    assert found == _results(scored["network"] / "results_nusc.json")
    assert not (tmp_path / "run/metrics.json").exists()


def test_predictions_of_clouds(simulated_root: Path, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    clouds = [str(path) for path in sorted((simulated_root / "samples/LIDAR_TOP").iterdir())[:2]]
    for name, how in (("network", _weights(checkpoint)), ("engine", _engine(engine))):
        options = small_options(simulated_root, tmp_path / name)
        main(["predict", *options, *how, "--data.root", "null", "--clouds", *clouds])
    ours, theirs = ((tmp_path / name / "predictions.json").read_bytes() for name in ("network", "engine"))
    assert ours == theirs
    found = _results(tmp_path / "engine/predictions.json")
    assert [len(found[cloud]) > 50 for cloud in clouds] == [True, True]
    assert len(list((tmp_path / "engine/bev").glob("*.png"))) == 2


# What goes with it


def test_weights_beside_it(
    scored: dict[str, Path],
    simulated_root: Path,
    checkpoint: Path,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["validate", *small_options(simulated_root, tmp_path / "run"), *_engine(engine)]
    error = fails([*options, *_weights(PTQ)], capsys)
    assert f"engine file '{engine}' was exported from '{checkpoint}' with SHA-256" in error
    assert f"not from '{PTQ}' with {sha256_of(PTQ)[:12]}" in error
    error = fails([*options, *_weights("absent.ckpt")], capsys)
    assert error.endswith("error: checkpoint 'absent.ckpt' does not exist")
    assert not (tmp_path / "run/metrics.json").exists()
    shutil.copy(checkpoint, tmp_path / "moved.ckpt")
    main([*options, *_weights(tmp_path / "moved.ckpt")])
    files = [(run / "results_nusc.json").read_bytes() for run in (scored["engine"], tmp_path / "run")]
    assert files[0] == files[1]
    assert read_metrics(tmp_path / "run/metrics.json")["arm"] == "deployed"


def test_weights_that_a_configuration_names_do_not_count(
    scored: dict[str, Path], simulated_root: Path, engine: Path, tmp_path: Path
) -> None:
    """The config.yaml of a fit names the checkpoint that the fit started from, and its arm and scheme."""
    options = ["validate", *small_options(simulated_root, tmp_path / "run", "qat"), *_engine(engine)]
    assert "weights: null" not in (SCHEMA_1 / "qat/config.yaml").read_text()
    main(options)
    files = [(run / "results_nusc.json").read_bytes() for run in (scored["engine"], tmp_path / "run")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("name", "value"), [("arm", "ptq"), ("scheme", "x.yaml"), ("batchnorm", "folded")])
def test_what_the_file_says_itself(
    name: str,
    value: str,
    simulated_root: Path,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["validate", *small_options(simulated_root, tmp_path / "run"), *_engine(engine)]
    error = fails([*options, f"--model.{name}", value], capsys)
    assert f"--model.{name} {value} beside model.engine_file '{engine}': what the file is, it says" in error


@pytest.mark.parametrize(
    ("setting", "given", "asked", "own"),
    [
        ("head_channels", "16", "16", "8"),
        ("voxel_size", "[0.32, 0.32, 0.32]", "(0.32, 0.32, 0.32)", "(0.64, 0.64, 0.32)"),
        ("class_groups", "[[car]]", "(('car',),)", "(('car',), ('motorcycle', 'bicycle'))"),
    ],
)
def test_another_network(
    setting: str,
    given: str,
    asked: str,
    own: str,
    simulated_root: Path,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["validate", *small_options(simulated_root, tmp_path / "run"), *_engine(engine)]
    error = fails([*options, f"--model.network.{setting}", given], capsys)
    assert f"model.network.{setting} is {asked}; engine file '{engine}' has {own}" in error


def test_a_setting_of_training_may_differ(simulated_root: Path, engine: Path, tmp_path: Path) -> None:
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(engine), "--data.test_split", "val"]
    main(["test", *options, "--model.network.backbone_bn_momentum", "0.5"])


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_checkpoint_to_load_beside_it(
    verb: str,
    simulated_root: Path,
    checkpoint: Path,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*small_options(simulated_root, tmp_path / "run"), "--data.test_split", "val"]
    error = fails([verb, *options, *_engine(engine), "--ckpt_path", str(checkpoint)], capsys)
    assert f"model.engine_file '{engine}' and a checkpoint to load: expected one of them" in error


NO_NETWORK: dict[str, Sequence[str]] = {
    "fit": (),
    "fit with weights": _weights(FLOAT),
    "fit that goes on": ("--ckpt_path", FLOAT),
    "calibrate": ("--output", "{out}/ptq.ckpt"),
    "calibrate with weights": ("--output", "{out}/ptq.ckpt", *_weights(FLOAT)),
    "sensitivity": ("--output", "{out}", *_weights(FLOAT), "--num_samples", "1"),
    "profile": ("--output", "{out}"),
    "profile with weights": ("--output", "{out}", *_weights(FLOAT)),
    "profile with checkpoints": (FLOAT, "--output", "{out}"),
}


@pytest.mark.parametrize("name", NO_NETWORK)
def test_verbs_that_need_a_network(
    name: str, simulated_root: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = [option.format(out=out) for option in NO_NETWORK[name]]
    scheme = ["--model.scheme", "configs/schemes/int8.yaml"]
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(engine), *scheme]
    error = fails([name.split()[0], *options, *more], capsys)
    assert (
        f"model.engine_file '{engine}' has no network to train, calibrate or measure; accepted with " in error
    )
    assert "accepted with validate, test and predict (profile has an --engine_file of its own)" in error
    assert not out.exists()
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_without_onnxruntime(
    verb: str,
    simulated_root: Path,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = [*small_options(simulated_root, tmp_path / "run"), *_engine(engine), "--data.test_split", "val"]
    error = fails([verb, *options], capsys)
    assert "deployment files need onnxruntime, which cannot be imported (" in error
    assert error.endswith("pip install cpq_train[deploy]")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.onnx", "engine file '{}' does not exist"),
        ("lonely.onnx", "engine file '{}' has no lonely.json beside it"),
        ("damaged.onnx", "damaged.json' is no JSON"),
    ],
)
def test_no_engine(
    name: str, message: str, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    (tmp_path / "damaged.json").write_text("{")
    if name != "absent.onnx":
        file.write_bytes(b"onnx")
    error = fails(["validate", *small_options(simulated_root, tmp_path / "run"), *_engine(file)], capsys)
    assert message.format(file) in error


# Data settings


def _bare_options(root: Path, folder: Path) -> list[str]:
    """Options that say nothing of the data but where they are."""
    config = yaml.safe_load((SCHEMA_1 / "float/config.yaml").read_text())
    kept = {"model": {name: config["model"][name] for name in ("network", "post_processing")}}
    (folder / "bare.yaml").write_text(yaml.safe_dump(kept))
    options = small_options(root, folder / "run")[2:]
    return [
        "-c",
        str(folder / "bare.yaml"),
        *options,
        "--trainer.accelerator",
        "cpu",
        "--data.num_workers",
        "0",
    ]


def _warnings(warned: pytest.WarningsRecorder) -> list[str]:
    texts = [str(warning.message) for warning in warned]
    return [text for text in texts if "data." in text and "was made with" in text]


def test_data_settings_come_from_the_sidecar(
    scored: dict[str, Path],
    simulated_root: Path,
    engine: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    main(["validate", *_bare_options(simulated_root, tmp_path), *_engine(engine)])
    assert _warnings(recwarn) == []
    files = [(run / "results_nusc.json").read_bytes() for run in (scored["engine"], tmp_path / "run")]
    assert files[0] == files[1]
    data = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert data["num_sweeps"] == 2


def test_other_data_settings_are_warned_of(
    scored: dict[str, Path],
    simulated_root: Path,
    engine: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    main(["validate", *_bare_options(simulated_root, tmp_path), *_engine(engine), "--data.num_sweeps", "1"])
    assert _warnings(recwarn) == [f"data.num_sweeps is 1; engine file '{engine}' was made with 2"]
    assert _results(tmp_path / "run/results_nusc.json") != _results(scored["engine"] / "results_nusc.json")


# Verify


def _damaged(engine: Path, folder: Path, layer: str, by: int = 1) -> Path:
    """A copy in which one weight code is another one, with a sidecar that fits."""
    for file in (engine, engine.with_suffix(".json")):
        shutil.copy(file, folder)
    model = onnx.load(str(engine))
    (weight,) = (one for one in model.graph.initializer if one.name == f"{layer}.weight_codes")
    codes = onnx.numpy_helper.to_array(weight).copy()
    at = np.unravel_index(np.argmin(np.abs(codes.astype(int))), codes.shape)
    codes[at] += by
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    forge(folder / engine.name, model.SerializeToString())
    return folder / engine.name


def _verify(checkpoint: Path, engine: Path, output: Path, *more: str) -> list[str]:
    return ["verify", str(checkpoint), "--engine", str(engine), "--output", str(output), *more]


def test_the_right_pair_passes(
    simulated_root: Path, checkpoint: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two samples of a data set."""
    output = tmp_path / "verify.json"
    main(_verify(checkpoint, engine, output, "--root", str(simulated_root), "--num_samples", "2"))
    document = json.loads(output.read_text())
    assert document["failures"] == []
    found = document["engine"]
    assert found["end_to_end"] == document["end_to_end"]
    assert found["num_detections"] == document["num_detections"] > 100
    flips = found["end_to_end"]
    assert flips["num_outputs"] == 2 * 40 * 40 * (2 * 10 + 3)
    assert flips["num_codes"] > 1_000_000
    for name in ("num_flipped", "num_further", "mismatched_outputs", "largest_difference"):
        assert flips[name] == 0
    assert found["num_other_detections"] == 0
    out = _plain(capsys.readouterr().out)
    assert "end to end against onnxruntime" in out
    assert f"of {flips['num_codes']:,} codes 0 differ by one step and 0 by more" in out


@pytest.mark.parametrize("name", ["ptq", "learned"])
def test_other_arms_pass(name: str, tmp_path: Path) -> None:
    checkpoint = stating(tmp_path, name)
    main(_verify(checkpoint, exported(checkpoint, tmp_path), tmp_path / "verify.json"))
    found = json.loads((tmp_path / "verify.json").read_text())["engine"]["end_to_end"]
    assert (found["num_flipped"], found["num_further"], found["mismatched_outputs"]) == (0, 0, 0)
    assert found["num_codes"] > 500_000


def test_without_an_engine_there_is_no_entry(checkpoint: Path, tmp_path: Path) -> None:
    main(["verify", str(checkpoint), "--output", str(tmp_path / "verify.json")])
    assert "engine" not in json.loads((tmp_path / "verify.json").read_text())


def test_a_cloud_without_a_voxel(
    checkpoint: Path, engine: Path, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that has some; alone it proves nothing of sparse layers, but the engine runs it."""
    np.full((7, 5), [500, 500, 500, 0, 0], np.float32).tofile(tmp_path / "far.bin")
    clouds = ["--cloud", str(tmp_path / "far.bin")]
    full = str(next(iter((simulated_root / "samples/LIDAR_TOP").iterdir())))
    verify = _verify(checkpoint, engine, tmp_path / "verify.json", *clouds)
    assert "12 integer layers were not compared: backbone_3d.conv1.0.conv1" in fails(verify, capsys)
    assert _same_outputs(tmp_path / "verify.json") == 40 * 40 * 23
    main([*verify, full])
    assert _same_outputs(tmp_path / "verify.json") == 2 * 40 * 40 * 23


def _same_outputs(file: Path) -> int:
    """The head outputs that were compared with those of the engine, all of them equal, and all codes."""
    found = json.loads(file.read_text())["engine"]
    flips = found["end_to_end"]
    assert (flips["num_flipped"], flips["num_further"], flips["mismatched_outputs"]) == (0, 0, 0)
    assert found["num_other_detections"] == 0
    return int(flips["num_outputs"])


def test_another_checkpoint_of_the_same_sizes(
    checkpoint: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(_verify(CHECKPOINTS["ptq"], engine, tmp_path / "verify.json"), capsys)
    assert f"engine file '{engine}' was exported from '{checkpoint}' with SHA-256" in error
    assert f"not from '{PTQ}'" in error
    assert not (tmp_path / "verify.json").exists()


@pytest.mark.parametrize(
    "layer", ["backbone_3d.conv2.1.conv1", "backbone_2d.deblocks.1.0", "dense_head.heads_list.1.hm.1"]
)
def test_one_weight_code_that_is_another(
    layer: str, checkpoint: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = _damaged(engine, tmp_path, layer, by=100)
    error = fails(_verify(checkpoint, damaged, tmp_path / "verify.json"), capsys)
    assert f"the engine's file holds other numbers: {layer}: its weight differs" in error
    assert "against the integer reference" not in error
    document = json.loads((tmp_path / "verify.json").read_text())
    assert any(f"{layer}: its weight differs" in failure for failure in document["failures"])
    assert document["end_to_end"]["num_flipped"] == document["end_to_end"]["mismatched_outputs"] == 0
    assert document["engine"]["end_to_end"]["mismatched_outputs"] > 0
    assert all(row["mismatched_outputs"] == 0 for row in document["layers"])


def test_codes_tell_without_the_numbers(
    checkpoint: Path,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the file says and what the engine computes are looked at separately."""
    damaged = _damaged(engine, tmp_path, "backbone_3d.conv1.0.conv1", by=100)
    honest, make = Probe(_engine_of(engine)).plan, Probe.__init__

    def pretend(self: Probe, engine: Any) -> None:
        make(self, engine)
        self.plan = honest

    monkeypatch.setattr(Probe, "__init__", pretend)
    error = fails(_verify(checkpoint, damaged, tmp_path / "verify.json"), capsys)
    assert "holds other numbers" not in error
    assert "codes are more than one step apart against onnxruntime" in error
    by_layer = json.loads((tmp_path / "verify.json").read_text())["engine"]["end_to_end"]["by_layer"]
    assert next(iter(by_layer)) == "backbone_3d.conv1.0.conv2"


def _engine_of(file: Path) -> Any:
    from cpq_train.export.engine import Engine

    return Engine(file)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_verify_without_a_package(
    package: str,
    checkpoint: Path,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    take_away(package, monkeypatch)
    error = fails(_verify(checkpoint, engine, tmp_path / "verify.json"), capsys)
    assert f"deployment files need {package}, which cannot be imported (" in error
    assert error.endswith("pip install cpq_train[deploy]")
    main(["verify", str(checkpoint)])  # which needs neither


# Times


def test_times_of_all_rows(scored: dict[str, Path], checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    output, latency = tmp_path / "profile", tmp_path / "profile/latency.json"
    options = [*small_options(Path("nowhere"), tmp_path / "run"), "--num_passes", "3"]
    files = [FLOAT, PTQ, str(checkpoint)]
    main(["profile", *options, *files, "--engine_file", str(engine), "--output", str(output)])
    rows = read_latency(latency)["rows"]
    assert [row["name"] for row in rows] == ["float", "ptq", "qat", "deployed"]
    assert [row["arm"] for row in rows] == ["float", "ptq", "qat", "deployed"]
    fake = "PyTorch, fake quantization"
    version = read_metrics(scored["engine"] / "metrics.json")["engine"]["version"]
    runs_as = [row["runs_as"] for row in rows]
    assert runs_as == ["PyTorch, float", fake, fake, f"engine, onnxruntime {version}"]
    assert [row["file"] for row in rows] == [*files, str(engine)]
    assert [row["sha256"] for row in rows] == [sha256_of(file) for file in (*files, engine)]
    assert rows[-1]["summary"] == {"engine_file_bytes": engine.stat().st_size}
    for row in rows:
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["cpu_ms"] > 0

    shutil.copytree(scored["network"], tmp_path / "qat")
    shutil.copytree(scored["engine"], tmp_path / "deployed")
    runs = [SCHEMA_1 / "float", SCHEMA_1 / "ptq", tmp_path / "qat", tmp_path / "deployed"]
    main(["compare", *map(str, runs), "--output", str(tmp_path / "report"), "--latency", str(latency)])
    report = json.loads((tmp_path / "report/report.json").read_text())
    found = {run["arm"]: run["latency"] for run in report["runs"]}
    assert list(found) == ["float", "ptq", "qat", "deployed"]
    for row in rows:
        assert found[row["arm"]]["ms"] == row["ms"]
        assert found[row["arm"]]["ratio_to_float"] == row["ms"] / rows[0]["ms"]
    text = (tmp_path / "report/report.md").read_text()
    assert f"| deployed | engine, onnxruntime {version} | {rows[-1]['ms']:.2f} |" in text
    assert "Without a measured latency" not in text
    assert "Only rows that run as an engine are deployment figures" in text


def test_times_of_an_engine_of_other_sizes(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(CHECKPOINTS["qat"], weights_only=True)
    content["hyper_parameters"]["post_processing"]["nms_pre"] = 7
    torch.save(content, tmp_path / "other.ckpt")
    options = [*small_options(Path("nowhere"), tmp_path / "run"), str(tmp_path / "other.ckpt")]
    error = fails(["profile", *options, "--engine_file", str(engine)], capsys)
    assert f"'{tmp_path / 'other.ckpt'}' and '{engine}' cannot be measured side by side" in error
    assert "model.post_processing.nms_pre is 7 and 1000" in error


def test_times_of_an_engine_of_other_data(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = stating(tmp_path, "qat", max_points_per_voxel=3)
    options = [*small_options(Path("nowhere"), tmp_path / "run"), str(checkpoint)]
    error = fails(["profile", *options, "--engine_file", str(engine)], capsys)
    assert "cannot be measured side by side: data.max_points_per_voxel is 3 and 10" in error


def test_times_of_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*small_options(Path("nowhere"), tmp_path / "run"), FLOAT, "--output", str(tmp_path / "out")]
    error = fails(["profile", *options, "--engine_file", "absent.onnx"], capsys)
    assert "engine file 'absent.onnx' does not exist" in error
    assert not (tmp_path / "out").exists()
