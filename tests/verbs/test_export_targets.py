"""`export` for every target, biases snapped or not, and what the other verbs make of such files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import fails
from exported_files import NEED_ONNX, forge, stating
from old_files import CHECKPOINTS, small_options

from cpq_train.common.files import sha256_of
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.export import comparison, engine
from cpq_train.export.deployed_detector import DeployedDetector, DeploymentError
from cpq_train.export.plan import Convolution
from cpq_train.export.sidecar import read_sidecar
from cpq_train.export.targets import TARGETS
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import PLAIN_VERBS, main
from cpq_train.verbs.export import RUNTIME_FILE

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")

ENGINES = ("portable", "portable-fast", "tensorrt")
"""Targets whose files onnxruntime runs."""

NUM_DENSE, NUM_SPARSE = 31, 12
"""Integer layers of the old networks that have biases."""


def _export(checkpoint: Path, output: Path, target: str, *more: str) -> list[str]:
    return ["export", str(checkpoint), "--output", str(output), "--target", target, *more]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With float biases, as all had."""
    return stating(tmp_path_factory.mktemp("checkpoint"), "qat")


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target -> its file, with snapped biases; TARGET.snapped.ckpt lies beside it."""
    folder = tmp_path_factory.mktemp("files")
    for target in TARGETS:
        main(_export(checkpoint, folder / f"{target}.onnx", target, "--snap_biases"))
    return {target: folder / f"{target}.onnx" for target in TARGETS}


def _snapped(file: Path) -> Path:
    return file.with_name(f"{file.stem}.snapped.ckpt")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _edited(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an old checkpoint in which something is something else."""
    path = stating(folder, name)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


# Written


NEXT = "compare with the checkpoint: cpq_train verify {} --engine {}"
SAID = {
    "portable": [NEXT],
    "portable-fast": ["19 of 31 dense layers go from codes to codes in one kernel", NEXT],
    "tensorrt": ["TensorRT's form, not run in TensorRT; it builds with: trtexec --onnx={1} ", NEXT],
    "libspconv": ["libspconv's form, not run in libspconv", "backbone_3d.conv_input.0: in fp16, with int8"],
}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_and_said(
    target: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep/net.onnx"
    main(_export(checkpoint, output, target, "--snap_biases"))
    out, snapped = _plain(capsys.readouterr().out), _snapped(output)
    assert _names(output.parent) == ["net.json", "net.onnx", "net.snapped.ckpt"]
    num = NUM_DENSE + (0 if target == "tensorrt" else NUM_SPARSE)
    kinds = " and ".join(sorted(set(TARGETS[target].snapped.values())))
    assert f"biases of {num} layers snapped to {kinds}: by " in out
    assert f"checkpoint with these biases: {snapped}" in out
    assert f"written and read back, every number equal: {output} (0." in out
    for line in SAID[target]:
        assert line.format(snapped, output) in out
    assert ("compare with the checkpoint" in out) == (target in ENGINES)
    read_sidecar(output)
    plan = TARGETS[target].read_plan(output)
    types = {
        one.bias.dtype for one in plan.operations if isinstance(one, Convolution) and one.bias is not None
    }
    whole = np.dtype(np.float16 if target == "libspconv" else np.int32)
    rest = {"portable": {np.dtype(np.float32)}, "portable-fast": {np.dtype(np.float32)}}.get(target, set())
    assert types == {whole} | rest  # conv_input is float in this scheme


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_sidecar_says(target: str, files: dict[str, Path]) -> None:
    file = files[target]
    document = json.loads(file.with_suffix(".json").read_text())
    assert (document["schema"], document["target"]) == (1, target)
    assert document["file"]["sha256"] == sha256_of(file)
    assert document["checkpoint"]["path"] == str(_snapped(file))
    assert document["checkpoint"]["sha256"] == sha256_of(_snapped(file))
    assert document["data"]["num_sweeps"] == 2
    assert document["coverage"]["sparse"] == [12, 13]
    graph = onnx.load(str(file)).graph
    for stated, ends in ((document["inputs"], graph.input), (document["outputs"], graph.output)):
        assert [one["name"] for one in stated] == [one.name for one in ends]
        assert all(one["meaning"] for one in stated)
    inputs = {one["name"]: one["shape"] for one in document["inputs"]}
    outputs = {one["name"]: one for one in document["outputs"]}
    voxels = {"voxel_features": ["V", 5], "voxel_coords": ["V", 3]}
    seam = {"spatial_features": [1, 4, 20, 20]}
    if target == "libspconv":
        assert list(outputs) == list(seam)
        assert "head" not in outputs["spatial_features"]
        assert document["versions"]["opset"] == 11
    else:
        assert inputs == (seam if target == "tensorrt" else voxels)
        assert list(outputs) == [f"head{one['head']}.{one['branch']}" for one in document["outputs"]]
        assert len(outputs) == 12


def test_halves_fit_together(files: dict[str, Path]) -> None:
    """What libspconv puts out is what TensorRT takes, in the words of both sidecars."""
    (seam,) = read_sidecar(files["libspconv"]).outputs
    (start,) = read_sidecar(files["tensorrt"]).inputs
    for key in ("name", "shape", "meaning"):
        assert seam[key] == start[key], key
    assert (seam["dtype"], start["dtype"]) == ("float16", "float32")


@pytest.mark.parametrize("target", ["portable", "tensorrt"])
def test_float_biases_stay_where_the_target_has_them(target: str, checkpoint: Path, tmp_path: Path) -> None:
    main(_export(checkpoint, tmp_path / "net.onnx", target))
    assert _names(tmp_path) == ["net.json", "net.onnx"]
    plan = TARGETS[target].read_plan(tmp_path / "net.onnx")
    assert {one.bias.dtype.name for one in plan.operations if isinstance(one, Convolution)} == {"float32"}


@pytest.mark.parametrize(
    ("target", "count", "reason", "layer"),
    [
        ("portable-fast", NUM_DENSE, "its bias is no whole multiple of its step", "dense_head.shared_conv.0"),
        ("libspconv", NUM_SPARSE, "its bias is fp32: set `bias: fp16`", "backbone_3d.conv1.0.conv1"),
    ],
)
def test_float_biases_are_refused_by_layer_elsewhere(
    target: str,
    count: int,
    reason: str,
    layer: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = fails(_export(checkpoint, tmp_path / "out/net.onnx", target), capsys)
    assert f"{count} layers cannot be exported: {reason}" in error
    assert layer in error
    assert error.count("or --snap_biases: ") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_target(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(_export(checkpoint, tmp_path / "net.onnx", "openvino"), capsys)
    for target in TARGETS:
        assert target in error
    assert not _names(tmp_path)


@pytest.mark.parametrize("target", ["tensorrt", "libspconv"])
def test_no_runtime_for_a_part(
    target: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(_export(checkpoint, tmp_path / "n.onnx", target, "--with_runtime", "--snap_biases"), capsys)
    assert f"--with_runtime with target '{target}', which is a part of a network; accepted with " in error
    assert error.endswith("accepted with portable, portable-fast")
    assert not _names(tmp_path)


# Snapped checkpoints


def test_the_sentence_says_how_far(
    checkpoint: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(_export(checkpoint, tmp_path / "net.onnx", "tensorrt", "--snap_biases"))
    ours, theirs = _units(_snapped(files["tensorrt"]))
    moved = {name: np.abs(np.rint(b / unit) * unit - b) for name, (b, unit) in zip(ours, theirs, strict=True)}
    farthest = max(moved, key=lambda name: moved[name].max())
    mean = np.mean([distance.mean() for distance in moved.values()])
    largest = np.abs(dict(zip(ours, theirs, strict=True))[farthest][0]).max()
    share = moved[farthest].max() / largest
    assert (
        f"biases of {len(moved)} layers snapped to accumulator: by {mean:.2g} in the mean, by up to "
        f"{moved[farthest].max():.2g} in {farthest} ({share:.2%} of its largest bias)"
    ) in _plain(capsys.readouterr().out)


def _units(path: Path) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """Dense layers, and the float bias and the unit of each."""
    network = CenterPointDetector.load_from_checkpoint(path).network
    layers = {n: m for n, m in network.named_modules() if getattr(m, "bias_kind", "") == "accumulator"}
    pairs = [(m.bias.detach().double().numpy(), m.unit().double().numpy()) for m in layers.values()]
    return list(layers), pairs


@pytest.mark.parametrize("target", TARGETS)
def test_a_snapped_checkpoint_has_the_tensors_of_its_source(
    target: str, checkpoint: Path, files: dict[str, Path]
) -> None:
    before, after = (torch.load(path, weights_only=True) for path in (checkpoint, _snapped(files[target])))
    assert before["state_dict"].keys() == after["state_dict"].keys()
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name]), name
    for key in ("hyper_parameters", "data", "epoch", "global_step"):
        assert after[key] == before[key], key
    assert "optimizer_states" not in after
    said, source = after["quantization"], before["quantization"]
    assert (said["arm"], said["calibration"]) == ("qat", source["calibration"])
    assert said["parents"] == {**source["parents"], "qat": sha256_of(checkpoint)}
    layers = said["layers"]
    kinds = {name: row["bias"] for name, row in layers.items()}
    integer = [
        n for n, row in layers.items() if row["arithmetic"] == "integer" and row["kind"] != "ResidualAdd"
    ]
    sparse = {"libspconv": "fp16", "tensorrt": "float"}.get(target, "accumulator")
    assert {kinds[name] for name in integer if _is_sparse(name)} == {sparse}
    assert {kinds[name] for name in integer if not _is_sparse(name)} == {"accumulator"}
    assert {kinds[name] for name in kinds.keys() - set(integer)} == {"float"}


def _is_sparse(name: str) -> bool:
    return name.startswith("backbone_3d.")


@pytest.mark.parametrize("target", ENGINES)
def test_a_snapped_checkpoint_verifies(target: str, files: dict[str, Path], tmp_path: Path) -> None:
    output, file = tmp_path / "verify.json", files[target]
    main(["verify", str(_snapped(file)), "--engine", str(file), "--output", str(output)])
    document = json.loads(output.read_text())
    assert document["failures"] == []
    flips = document["engine"]["end_to_end"]
    assert flips["num_codes"] > 300_000
    assert flips["num_further"] == 0
    assert flips["num_flipped"] <= 1e-4 * flips["num_codes"]
    if target == "portable":
        assert document["engine"]["num_other_detections"] == flips["mismatched_outputs"] == 0
    if target == "tensorrt":  # last bits of its sums in float: boxes differ, and that does not fail
        assert document["engine"]["num_other_detections"] > 0
        assert flips["largest_difference"] < 1e-5


def test_a_snapped_checkpoint_scores_nearly_as_its_source(
    checkpoint: Path, files: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    found = {}
    for name, weights in (("source", checkpoint), ("snapped", _snapped(files["portable"]))):
        options = small_options(simulated_root, tmp_path / name)
        main(["validate", *options, "--model.weights", str(weights)])
        found[name] = read_metrics(tmp_path / name / "metrics.json")
    assert found["snapped"]["arm"] == "qat"
    assert found["snapped"]["parents"]["qat"] == found["source"]["checkpoint"]["sha256"]
    for metric in ("mAP", "NDS"):
        assert abs(found["snapped"]["metrics"][metric] - found["source"]["metrics"][metric]) < 0.01
    results = [(tmp_path / name / "results_nusc.json").read_text() for name in found]
    assert results[0] != results[1]


def test_a_fit_starts_from_a_snapped_checkpoint(
    files: dict[str, Path], simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the scheme that it has; a scheme file says other biases, and that is refused."""
    options = ["fit", *small_options(simulated_root, tmp_path / "run", "qat")]
    options += ["--model.weights", str(_snapped(files["portable"]))]
    error = fails([*options, "--model.scheme", "configs/schemes/w4a8.yaml"], capsys)
    assert "rules.2.bias: checkpoint accumulator, model.scheme none" in error
    main([*options, "--model.scheme", "null"])
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert content["quantization"]["layers"]["dense_head.shared_conv.0"]["bias"] == "accumulator"
    assert content["quantization"]["parents"].keys() == {"float", "ptq", "qat"}
    main(_export(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "net.onnx", "portable-fast"))
    assert not _snapped(tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_biases_that_are_so_already(
    target: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No second checkpoint; the file is the same."""
    snapped = _snapped(files[target])
    main(_export(snapped, tmp_path / "net.onnx", target, "--snap_biases"))
    out = _plain(capsys.readouterr().out)
    assert f"no bias of {snapped} is to be snapped" in out
    assert _names(tmp_path) == ["net.json", "net.onnx"]
    assert _numbers(tmp_path / "net.onnx") == _numbers(files[target])
    assert read_sidecar(tmp_path / "net.onnx").checkpoint["sha256"] == sha256_of(snapped)


def _numbers(file: Path) -> bytes:
    content: bytes = onnx.load(str(file)).graph.SerializeToString()
    return content


def test_its_own_source_is_never_replaced(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint with biases for one target, beside which the file for another is asked for."""
    source = tmp_path / "net.snapped.ckpt"
    shutil.copy(_snapped(files["libspconv"]), source)
    before = sha256_of(source)
    error = fails(_export(source, tmp_path / "net.onnx", "portable", "--snap_biases"), capsys)
    assert f"the checkpoint with other biases would replace '{source}', which is something else" in error
    assert _names(tmp_path) == [source.name]
    assert sha256_of(source) == before
    main(_export(source, tmp_path / "net.onnx", "libspconv", "--snap_biases"))  # has them: nothing to replace
    assert sha256_of(source) == before


def test_a_foreign_file_in_its_place(
    checkpoint: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "net.snapped.ckpt"
    for content in (b"precious", checkpoint.read_bytes()):
        place.write_bytes(content)
        error = fails(_export(checkpoint, tmp_path / "net.onnx", "portable", "--snap_biases"), capsys)
        assert f"would replace '{place}', which is something else; choose another name" in error
        assert place.read_bytes() == content
        assert _names(tmp_path) == [place.name]


def test_an_engine_of_snapped_biases_descends_from_the_run(files: dict[str, Path], checkpoint: Path) -> None:
    """So that a comparison finds the run that it was made of."""
    assert read_sidecar(files["portable"]).parents["qat"] == sha256_of(checkpoint)


def test_both_halves_are_of_one_snapped_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    main(_export(checkpoint, tmp_path / "sparse.onnx", "libspconv", "--snap_biases"))
    snapped = tmp_path / "sparse.snapped.ckpt"
    main(_export(snapped, tmp_path / "dense.onnx", "tensorrt", "--snap_biases"))
    assert {read_sidecar(tmp_path / f"{half}.onnx").checkpoint["sha256"] for half in ("sparse", "dense")} == {
        sha256_of(snapped)
    }


def test_a_half_is_snapped_though_the_other_has_dynamic_ranges(tmp_path: Path) -> None:
    """Dynamic layers on maps keep their float biases; the half on voxels is written."""

    def change(content: dict[str, Any]) -> None:
        rule = {"layers": "*", "kinds": ["Conv2d", "ConvTranspose2d"], "input": {"mode": "dynamic"}}
        content["quantization"]["scheme"]["rules"] += (rule,)
        state = content["state_dict"]
        for name in [n for n in state if "backbone_3d" not in n and n.endswith("_input_quantizer._amax")]:
            del state[name]

    checkpoint = _edited(tmp_path, "qat", change)
    main(_export(checkpoint, tmp_path / "net.onnx", "libspconv", "--snap_biases"))
    rows = torch.load(tmp_path / "net.snapped.ckpt", weights_only=True)["quantization"]["layers"]
    assert rows["dense_head.shared_conv.0"]["bias"] == "float"
    assert rows["backbone_3d.conv_out.0"]["bias"] == "fp16"


def test_a_folder_in_its_place(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.snapped.ckpt").mkdir()
    error = fails(_export(checkpoint, tmp_path / "net.onnx", "portable", "--snap_biases"), capsys)
    assert f"'{tmp_path / 'net.snapped.ckpt'}' is a folder; accepted: a file" in error
    assert _names(tmp_path) == ["net.snapped.ckpt"]


def test_an_older_one_of_its_own_is_replaced(
    checkpoint: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    for target in ("libspconv", "tensorrt"):
        main(_export(checkpoint, tmp_path / "net.onnx", target, "--snap_biases"))
    assert _names(tmp_path) == ["net.json", "net.onnx", "net.snapped.ckpt"]
    one, other = (
        torch.load(p, weights_only=True) for p in (tmp_path / "net.snapped.ckpt", _snapped(files["tensorrt"]))
    )
    assert one["quantization"] == other["quantization"]


def test_a_file_in_place_of_its_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    error = fails(_export(checkpoint, tmp_path / "taken/net.onnx", "portable", "--snap_biases"), capsys)
    assert f"'{tmp_path / 'taken'}' is no folder" in error
    assert (tmp_path / "taken").read_text() == "mine"


# What has no place in a file, snapped or not


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("arm", ["float", "float_tuned"])
def test_float_networks_have_no_biases_to_snap(
    arm: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(_export(CHECKPOINTS[arm], tmp_path / "out/net.onnx", target, "--snap_biases"), capsys)
    assert f"is of arm '{arm}', whose layers are float ones; accepted: ptq and qat" in error
    assert not _names(tmp_path)


DENSE_SUMS = "dense_head.heads_list.0.hm.0.0"
DEAD = [1, 4]
"""Channels whose weights are next to nothing, and whose bias is like the others'."""


def _with_dead_channels(layer: str, **scheme: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        state, name = content["state_dict"], f"network.{layer}"
        state[f"{name}.weight"][DEAD] *= 1e-5
        state[f"{name}._weight_quantizer._amax"][DEAD] *= 1e-5
        state[f"{name}.bias"][DEAD] = 0.5
        content["quantization"]["scheme"].update(scheme)

    return change


def test_steps_too_small_are_refused_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _edited(tmp_path / "in", "qat", _with_dead_channels(DENSE_SUMS))
    error = fails(_export(path, tmp_path / "net.onnx", "portable-fast", "--snap_biases"), capsys)
    said = "step too small for the bias; accepted: on_small_step: widen, or bias: float 2 of 8, channels 1, 4"
    assert f"{DENSE_SUMS}._weight_quantizer Conv2d {said}" in error
    assert _names(tmp_path) == ["in"]
    main(_export(path, tmp_path / "net.onnx", "portable"))  # float biases ask nothing of a step


def test_steps_too_small_are_widened_where_the_scheme_says_so(tmp_path: Path) -> None:
    path = _edited(tmp_path / "in", "qat", _with_dead_channels(DENSE_SUMS, on_small_step="widen"))
    file = tmp_path / "net.onnx"
    main(_export(path, file, "portable-fast", "--snap_biases"))
    before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (path, _snapped(file)))
    name = f"network.{DENSE_SUMS}._weight_quantizer._amax"
    others = [channel for channel in range(8) if channel not in DEAD]
    assert torch.equal(after[name][others], before[name][others])
    assert (after[name][DEAD] > 10 * before[name][DEAD]).all()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [name]
    main(["verify", str(_snapped(file)), "--engine", str(file)])


def test_channels_of_zeros_keep_their_bias(tmp_path: Path) -> None:
    def zeros(content: dict[str, Any]) -> None:
        for end in ("weight", "_weight_quantizer._amax"):
            content["state_dict"][f"network.{DENSE_SUMS}.{end}"][DEAD] = 0

    path, file = _edited(tmp_path / "in", "qat", zeros), tmp_path / "net.onnx"
    main(_export(path, file, "portable-fast", "--snap_biases"))
    main(["verify", str(_snapped(file)), "--engine", str(file)])
    layer = TARGETS["portable-fast"].read_plan(file)[DENSE_SUMS]
    assert isinstance(layer, Convolution)
    assert layer.bias is not None
    assert np.abs(layer.bias[DEAD]).min() > 100


def _with_scheme(**defaults: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["quantization"]["scheme"]["defaults"].update(defaults)

    return change


def _dynamic_inputs(content: dict[str, Any]) -> None:
    _with_scheme(input={"mode": "dynamic"})(content)
    state = content["state_dict"]
    for name in [
        name for name in state if name.endswith(("_input_quantizer._amax", "_residual_quantizer._amax"))
    ]:
        del state[name]


@pytest.mark.parametrize("target", TARGETS)
def test_dynamic_ranges_are_refused_before_biases_are_looked_at(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _edited(tmp_path / "in", "ptq", _dynamic_inputs)
    error = fails(_export(path, tmp_path / "net.onnx", target, "--snap_biases"), capsys)
    assert "the range of its input is dynamic: a file holds static ones" in error
    assert _names(tmp_path) == ["in"]


def test_nothing_is_written_of_what_is_refused_when_snapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Biases are no longer what is in the way, but something else is."""
    path = _edited(tmp_path / "in", "ptq", _with_scheme(input={"bits": 16}))
    for target in ("libspconv", "tensorrt"):
        error = fails(_export(path, tmp_path / "net.onnx", target, "--snap_biases"), capsys)
        assert "layers cannot be exported" in error
        assert "bits: 8" in error
        assert "snap_biases" not in error
        assert _names(tmp_path) == ["in"]


# Engines


def _run(verb: str, root: Path, run: Path, file: Path, *more: str) -> list[str]:
    engine = ["--model.engine_file", str(file)]
    return [verb, *small_options(root, run), "--data.test_split", "val", *engine, *more]


def _weights(file: Path) -> list[str]:
    return ["--model.weights", str(file)]


def _boxes(path: Path) -> np.ndarray:
    results = json.loads(path.read_text())["results"]
    return np.array(
        [
            [*box["translation"], *box["size"], box["detection_score"]]
            for rows in results.values()
            for box in rows
        ]
    )


@pytest.mark.parametrize("target", ["portable-fast", "tensorrt"])
def test_an_engine_scores_as_its_checkpoint(
    target: str, files: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    file, snapped = files[target], _snapped(files[target])
    main(["validate", *small_options(simulated_root, tmp_path / "ours"), *_weights(snapped)])
    main(_run("validate", simulated_root, tmp_path / "theirs", file, *_weights(snapped)))
    main(_run("test", simulated_root, tmp_path / "test", file, *_weights(snapped)))
    ours, theirs = (read_metrics(tmp_path / name / "metrics.json") for name in ("ours", "theirs"))
    for metric in ("mAP", "NDS"):
        assert abs(ours["metrics"][metric] - theirs["metrics"][metric]) < 1e-3
    assert theirs["arm"] == "deployed"
    assert theirs["engine"]["target"] == target
    assert theirs["parents"] == ours["parents"]
    found = [_boxes(tmp_path / name / "results_nusc.json") for name in ("ours", "theirs", "test")]
    assert len(found[0]) > 500
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(np.sort(found[0], 0), np.sort(found[1], 0), atol=1e-3)


def test_predictions_of_a_cloud_by_a_dense_part(
    files: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    cloud = str(next(iter(sorted((simulated_root / "samples/LIDAR_TOP").iterdir()))))
    more = ["--data.root", "null", "--clouds", cloud, *_weights(_snapped(files["tensorrt"]))]
    main(["predict", *small_options(simulated_root, tmp_path / "ours"), *more])
    main(_run("predict", simulated_root, tmp_path / "theirs", files["tensorrt"], *more))
    ours, theirs = (_boxes(tmp_path / name / "predictions.json") for name in ("ours", "theirs"))
    assert len(ours) > 50
    np.testing.assert_allclose(np.sort(ours, 0), np.sort(theirs, 0), atol=1e-3)


def test_a_fast_file_needs_no_checkpoint(
    files: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    main(_run("test", simulated_root, tmp_path / "run", files["portable-fast"]))
    assert len(_boxes(tmp_path / "run/results_nusc.json")) > 500


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_a_dense_part_needs_its_checkpoint(
    verb: str,
    files: dict[str, Path],
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights that only a configuration names do not count."""
    options = _run(verb, simulated_root, tmp_path / "run", files["tensorrt"])
    error = fails(options, capsys)
    assert (
        f"engine file '{files['tensorrt']}' is of target 'tensorrt', a dense part alone: it runs behind"
        in error
    )
    assert error.endswith("with validate, test and predict and --model.weights CHECKPOINT")


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ("source", (), "was exported from '{snapped}' with SHA-256 {sha}…, not from '{weights}'"),
        ("absent.ckpt", (), "checkpoint 'absent.ckpt' does not exist"),
        (
            "snapped",
            ("--model.network.head_channels", "16"),
            "is of another architecture than model.network: 38 of",
        ),
    ],
)
def test_a_dense_part_beside_something_else(
    weights: str,
    more: tuple[str, ...],
    message: str,
    checkpoint: Path,
    files: dict[str, Path],
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, snapped = files["tensorrt"], _snapped(files["tensorrt"])
    chosen = {"source": checkpoint, "snapped": snapped}.get(weights, Path(weights))
    error = fails(_run("validate", simulated_root, tmp_path / "run", file, *_weights(chosen), *more), capsys)
    assert message.format(snapped=snapped, sha=sha256_of(snapped)[:12], weights=chosen) in error
    assert not (tmp_path / "run/metrics.json").exists()


def test_a_dense_part_of_another_network(
    files: dict[str, Path],
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [
        "--model.network.class_names",
        "[car, motorcycle, bicycle]",
        *_weights(_snapped(files["tensorrt"])),
    ]
    error = fails(_run("test", simulated_root, tmp_path / "run", files["tensorrt"], *more), capsys)
    assert "model.network.class_names is ('car', 'motorcycle', 'bicycle'); engine file " in error


@pytest.mark.parametrize("verb", ["validate", "verify"])
def test_no_engine_runs_a_sparse_part(
    verb: str,
    files: dict[str, Path],
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, snapped = files["libspconv"], _snapped(files["libspconv"])
    options = _run(verb, simulated_root, tmp_path / "run", file, *_weights(snapped))
    if verb == "verify":
        options = ["verify", str(snapped), "--engine", str(file)]
    error = fails(options, capsys)
    assert (
        f"engine file '{file}' is of target 'libspconv'; accepted: portable, portable-fast, tensorrt" in error
    )


# Times


def _profile(files: dict[str, Path], target: str, run: Path) -> list[str]:
    options = [*small_options(Path("nowhere"), run), "--num_passes", "1", "--output", str(run / "out")]
    return ["profile", *options, str(_snapped(files[target])), "--engine_file", str(files[target])]


def test_times_of_a_fast_file(files: dict[str, Path], tmp_path: Path) -> None:
    main(_profile(files, "portable-fast", tmp_path))
    rows = json.loads((tmp_path / "out/latency.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["qat", "deployed"]
    assert rows[-1]["file"] == str(files["portable-fast"])


def test_a_part_is_not_timed(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(_profile(files, "tensorrt", tmp_path), capsys)
    assert f"engine file '{files['tensorrt']}' is of target 'tensorrt'" in error
    assert not (tmp_path / "out/latency.json").exists()


# Verify


def _forged(file: Path, folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """A copy with other numbers, and a sidecar that fits."""
    for one in (file, file.with_suffix(".json")):
        shutil.copy(one, folder)
    model = onnx.load(str(file))
    for one in model.graph.initializer:
        values = onnx.numpy_helper.to_array(one).copy()
        one.CopyFrom(onnx.numpy_helper.from_array(change(one.name, values), one.name))
    forge(folder / file.name, model.SerializeToString())
    return folder / file.name


OF_CODES, OF_OUTPUTS = (
    "codes are more than one step apart",
    "head outputs on the network's codes differ by up to",
)


@pytest.mark.parametrize(
    ("layer", "said"), [("dense_head.shared_conv.0", OF_CODES), ("dense_head.heads_list.0.hm.1", OF_OUTPUTS)]
)
@pytest.mark.parametrize("target", ["portable-fast", "tensorrt"])
def test_another_number_is_found(
    target: str,
    layer: str,
    said: str,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def change(name: str, values: np.ndarray) -> np.ndarray:
        if name == f"{layer}.weight_codes":
            values.reshape(-1)[::7] ^= 64
        return values

    damaged = _forged(files[target], tmp_path, change)
    output = tmp_path / "verify.json"
    snapped = str(_snapped(files[target]))
    error = fails(["verify", snapped, "--engine", str(damaged), "--output", str(output)], capsys)
    assert f"the engine's file holds other numbers: {layer}: its weight differs" in error
    document = json.loads(output.read_text())
    assert any(said in failure for failure in document["failures"])
    assert not any("detections differ" in failure for failure in document["failures"])
    assert (document["engine"]["end_to_end"]["mismatched_outputs"] == 0) == (
        target == "portable-fast" and said == OF_CODES
    )


def _let_engines_differ(monkeypatch: pytest.MonkeyPatch, file: Path, steps: float) -> None:
    """A layer puts out more than it should, in steps of those that read it, while it runs."""
    plan = TARGETS[read_sidecar(file).target].read_plan(file)
    layer, make = plan["dense_head.shared_conv.0"], engine.new_session
    assert isinstance(layer, Convolution)
    assert layer.input_range is not None
    assert layer.weight_step is not None
    chosen = next(read for _, source, read in plan.reads() if source == layer.name)
    assert chosen is not None
    by = steps * chosen.amax / chosen.largest
    unit = layer.input_range.amax / layer.input_range.largest * layer.weight_step[0]

    def new_session(content: bytes, where: str) -> Any:
        model = onnx.ModelProto.FromString(content)
        (bias,) = (
            n for n in model.graph.initializer if n.name in (f"{layer.name}.bias", f"{layer.name}.bias_codes")
        )
        values = onnx.numpy_helper.to_array(bias).copy()
        values += by if values.dtype == np.float32 else round(by / unit)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return make(model.SerializeToString(), where)

    for module in (engine, comparison):
        monkeypatch.setattr(module, "new_session", new_session)


@pytest.mark.parametrize(
    ("target", "steps", "share", "failure"),
    [
        ("portable-fast", 0.1, "1", None),
        ("tensorrt", 0.1, "1", None),
        ("tensorrt", 0.1, "1e-6", "of the codes flipped against"),
        ("portable-fast", 20, "1", "codes are more than one step apart against"),
        ("portable", 0.1, "1", "detections differ against"),
    ],
)
def test_which_differences_fail(
    target: str,
    steps: float,
    share: str,
    failure: str | None,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other detections alone do so for none but the exact target."""
    file, output = files[target], tmp_path / "verify.json"
    _let_engines_differ(monkeypatch, file, steps)
    options = ["verify", str(_snapped(file)), "--engine", str(file), "--output", str(output)]
    options += ["--max_flipped_share", share]
    if failure is None:
        main(options)
    else:
        assert f"{failure} onnxruntime" in fails(options, capsys)
    found = json.loads(output.read_text())
    flips = found["engine"]["end_to_end"]
    assert flips["num_flipped"] + flips["num_further"] > 0
    assert found["engine"]["num_other_detections"] > 0
    assert any("detections differ" in one for one in found["failures"]) == (target == "portable")


# Without PyTorch, and without ONNX


def test_the_copied_runtime_runs_a_fast_file(
    checkpoint: Path, files: dict[str, Path], simulated_root: Path, tmp_path: Path
) -> None:
    main(_export(checkpoint, tmp_path / "net.onnx", "portable-fast", "--snap_biases", "--with_runtime"))
    assert _names(tmp_path) == [RUNTIME_FILE, "net.json", "net.onnx", "net.snapped.ckpt"]
    cloud = str(next(iter(sorted((simulated_root / "samples/LIDAR_TOP").iterdir()))))
    command = [
        str(tmp_path / RUNTIME_FILE),
        str(tmp_path / "net.onnx"),
        "--clouds",
        cloud,
        "--num_threads",
        "1",
    ]
    output = tmp_path / "boxes.json"
    subprocess.run([sys.executable, *command, "--output", str(output)], check=True, capture_output=True)
    (found,) = json.loads(output.read_text())["results"].values()
    options = ["--data.root", "null", "--clouds", cloud, *_weights(_snapped(files["portable-fast"]))]
    main(["predict", *small_options(simulated_root, tmp_path / "run"), *options])
    expected = _boxes(tmp_path / "run/predictions.json")
    assert len(found) == len(expected) > 50
    np.testing.assert_allclose(sorted(box["score"] for box in found), np.sort(expected[:, -1]), atol=1e-4)


@pytest.mark.parametrize("target", ["tensorrt", "libspconv"])
def test_the_copied_runtime_runs_no_parts(target: str, files: dict[str, Path]) -> None:
    with pytest.raises(DeploymentError, match=rf"target: .*'{target}'.*'portable' or 'portable-fast'"):
        DeployedDetector(files[target])


WITHOUT_ONNX = """
import importlib, pkgutil, sys
from contextlib import suppress
sys.modules["onnx"] = sys.modules["onnxruntime"] = None
import cpq_train.export
from cpq_train.verbs.cli import PLAIN_VERBS, main
for verb in PLAIN_VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as exit_:
        assert exit_.code == 0, verb
for module in pkgutil.walk_packages(cpq_train.export.__path__, "cpq_train.export."):
    try:
        with suppress(ModuleNotFoundError):  # deployed_detector.py, which is not of this package once copied
            importlib.import_module(module.name)
    except cpq_train.common.errors.UserError:
        print("needs onnx:", module.name)
"""


def test_without_onnx_every_plain_verb_has_its_help() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_ONNX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(PLAIN_VERBS)
    need = [
        line.rpartition("cpq_train.export.")[2] for line in done.stdout.splitlines() if "needs onnx:" in line
    ]
    assert sorted(need) == sorted(NEED_ONNX)
