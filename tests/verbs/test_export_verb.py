"""`export` as a user runs it: the files that it writes, and what it refuses."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from command_line import fails
from exported_files import DATA, stating, take_away
from old_files import CHECKPOINTS

import cpq_train.export
from cpq_train.arms.description import Description
from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.export import writing
from cpq_train.export.sidecar import read_sidecar
from cpq_train.models import NetworkConfig
from cpq_train.quantization.coverage import coverage_of
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

RUNTIME = Path(cpq_train.export.__file__).parent / "deployed_detector.py"


def _export(checkpoint: Path, output: Path, *options: str) -> list[str]:
    return ["export", str(checkpoint), "--output", str(output), *options]


def _shape(value: Any) -> list[int | str]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stating(tmp_path_factory.mktemp("checkpoint"), "qat", max_points_per_voxel=7)


def test_it_writes_two_files_and_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep/folder/net.onnx"
    main(_export(checkpoint, output))
    out = " ".join(capsys.readouterr().out.split())
    assert f"written and read back, every number equal: {output} (0.1" in out
    assert f"beside it: {output.with_suffix('.json')}" in out
    assert f"compare with the checkpoint: cpq_train verify {checkpoint} --engine {output}" in out
    assert sorted(path.name for path in output.parent.iterdir()) == ["net.json", "net.onnx"]
    onnx.checker.check_model(str(output), full_check=True)


def test_the_runtime_goes_along(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(_export(checkpoint, tmp_path / "net.onnx", "--with_runtime"))
    assert f"beside it: {tmp_path / RUNTIME.name}" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / RUNTIME.name).read_bytes() == RUNTIME.read_bytes()


def test_another_file_in_the_place_of_the_runtime_stays(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / RUNTIME.name).write_text("mine")
    error = fails(_export(checkpoint, tmp_path / "net.onnx", "--with_runtime"), capsys)
    assert f"{tmp_path / RUNTIME.name} exists and is not the runtime of this release" in error
    assert [path.name for path in tmp_path.iterdir()] == [RUNTIME.name]
    assert (tmp_path / RUNTIME.name).read_text() == "mine"


def test_what_the_sidecar_says(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.onnx"
    main(_export(checkpoint, output))
    document, content = json.loads(output.with_suffix(".json").read_text()), output.read_bytes()
    source = torch.load(checkpoint, weights_only=True)
    settings = source["hyper_parameters"]
    assert (document["schema"], document["target"]) == (1, "portable")
    sha256 = hashlib.sha256(content).hexdigest()
    assert document["file"] == {"name": "net.onnx", "sha256": sha256, "num_bytes": len(content)}
    assert document["checkpoint"] == {
        "path": str(checkpoint),
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "arm": "qat",
        "parents": source["quantization"]["parents"],
    }
    assert document["checkpoint"]["parents"].keys() == {"float", "ptq"}
    assert Scheme.from_dict(document["scheme"]) == Description.of(source, checkpoint).scheme
    assert document["coverage"] == {
        "sparse": [12, 13],
        "ResidualAdd": [4, 4],
        "Conv2d": [29, 29],
        "ConvTranspose2d": [2, 2],
    }
    usual = {"point_columns": ["x", "y", "z", "intensity", "ring"], "intensity_scale": 1.0}
    assert document["data"] == json.loads(json.dumps({**DATA, **usual, "max_points_per_voxel": 7}))
    network = {**settings["network"], "class_names": DETECTION_CLASSES}  # older than that setting
    assert document["network"] == json.loads(json.dumps(network))
    assert document["post_processing"] == json.loads(json.dumps(settings["post_processing"]))
    assert document["post_processing"]["score_threshold"] == 0.03
    assert document["class_names"] == list(DETECTION_CLASSES)
    assert document["head_map"] == {"stride": 4, "width": 40, "height": 40}
    assert document["versions"].keys() == {"cpq_train", "torch", "onnx", "opset"}


def test_inputs_and_outputs_are_those_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.onnx"
    main(_export(checkpoint, output))
    said, graph = read_sidecar(output), onnx.load(str(output)).graph
    types = {"float32": onnx.TensorProto.FLOAT, "int32": onnx.TensorProto.INT32}
    for stated, found in ((said.inputs, graph.input), (said.outputs, graph.output)):
        assert [(one["name"], types[one["dtype"]], one["shape"]) for one in stated] == [
            (one.name, one.type.tensor_type.elem_type, _shape(one)) for one in found
        ]
    assert [one["shape"] for one in said.inputs] == [["V", 5], ["V", 3]]
    assert len(said.outputs) == 2 * 6
    for one in said.outputs:
        assert one["name"] == f"head{one['head']}.{one['branch']}"
        assert one["meaning"]
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    feed = {
        "voxel_features": torch.ones(1, 5).numpy(),
        "voxel_coords": torch.zeros(1, 3, dtype=torch.int32).numpy(),
    }
    for one, value in zip(said.outputs, session.run(None, feed), strict=True):
        assert list(value.shape) == one["shape"]


@pytest.mark.parametrize(("name", "arm"), [("ptq", "ptq"), ("qat", "qat"), ("learned", "qat")])
def test_kinds_of_checkpoints(
    name: str, arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Old ones, which do not say with what data they were made; the console says what is taken."""
    main(_export(CHECKPOINTS[name], tmp_path / "net.onnx"))
    assert "does not say with what data settings it was made: taking num_sweeps 10" in " ".join(
        capsys.readouterr().out.split()
    )
    said = read_sidecar(tmp_path / "net.onnx")
    detector = CenterPointDetector.load_from_checkpoint(CHECKPOINTS[name])
    assert said.checkpoint["arm"] == arm
    assert said.checkpoint["sha256"] == sha256_of(CHECKPOINTS[name])
    assert said.checkpoint["parents"] == detector.subject.parents
    counts = coverage_of(detector.subject.prepared).counts
    assert said.coverage == {kind: list(n) for kind, n in counts.items()}
    assert said.data["num_sweeps"] == 10
    assert tuple(said.data["voxel_size"]) == detector.network_config.voxel_size


def test_a_checkpoint_with_other_scales_is_another_file(tmp_path: Path) -> None:
    for name in ("ptq", "qat", "learned"):
        main(_export(CHECKPOINTS[name], tmp_path / f"{name}.onnx"))
    assert len({sha256_of(file) for file in tmp_path.glob("*.onnx")}) == 3


@pytest.mark.parametrize("arm", ["float", "float_tuned"])
def test_float_networks_are_refused(arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out/net.onnx"
    error = fails(_export(CHECKPOINTS[arm], output, "--with_runtime"), capsys)
    assert f"is of arm '{arm}', whose layers are float ones; accepted: ptq and qat" in error
    assert str(CHECKPOINTS[arm]) in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["frozen", "trained"])
def test_kept_batchnorm_is_refused(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    torch.manual_seed(0)
    scheme = Scheme.from_file("configs/schemes/int8.yaml")
    config = NetworkConfig(**own["hyper_parameters"]["network"])
    subject = build(config, "qat", scheme, policy)
    coords = torch.unique(torch.randint(0, 25, (2000, 3)), dim=0)
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    with collecting_ranges(subject.network.eval()):
        subject.network(torch.randn(len(coords), 5) * 20, coords, 1)
    state = {f"network.{name}": value for name, value in subject.network.state_dict().items()}
    torch.save({**own, "state_dict": state, "quantization": subject.describe()}, tmp_path / "kept.ckpt")
    error = fails(_export(tmp_path / "kept.ckpt", tmp_path / "out/net.onnx", "--with_runtime"), capsys)
    assert "layers cannot be exported" in error
    assert (
        "its BatchNorm was kept in training: export folded.ckpt, which fit writes beside last.ckpt" in error
    )
    assert "backbone_3d.conv_input.1" in error
    assert [path.name for path in tmp_path.iterdir()] == ["kept.ckpt"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "net.ckpt' does not exist"), (b"garbage", "net.ckpt' is corrupt")]
)
def test_no_checkpoint(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "net.ckpt").write_bytes(content)
    assert message in fails(_export(tmp_path / "net.ckpt", tmp_path / "out/net.onnx"), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["net.pt", "net", "folder.onnx", "net.onnx.json"])
def test_an_output_of_another_kind(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    error = fails(_export(checkpoint, tmp_path / name, "--with_runtime"), capsys)
    is_folder = name == "folder.onnx"
    why = " is a folder; accepted: a file" if is_folder else ": expected a file that ends in .onnx"
    assert f"output '{tmp_path / name}'{why}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]
    assert not list((tmp_path / "folder.onnx").iterdir())


@pytest.mark.parametrize("content", ['{"target": "a robot"}', "[1]", "no JSON", ""])
def test_another_json_beside_is_kept(
    content: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.json").write_text(content)
    error = fails(_export(checkpoint, tmp_path / "net.onnx", "--with_runtime"), capsys)
    assert f"its sidecar would replace '{tmp_path / 'net.json'}', which is something else" in error
    assert (tmp_path / "net.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["net.json"]


def test_its_own_pair_is_written_over(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "net.onnx"
    main(_export(CHECKPOINTS["ptq"], output))
    main(_export(checkpoint, output))
    assert read_sidecar(output).checkpoint["sha256"] == sha256_of(checkpoint)
    again = tmp_path / "again.onnx"
    main(_export(checkpoint, again))
    assert again.read_bytes() == output.read_bytes()


def test_what_cannot_be_read_back_does_not_appear(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the pair that was there stays."""
    output = tmp_path / "net.onnx"
    main(_export(CHECKPOINTS["ptq"], output))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = onnx.save

    def save_another(model: onnx.ModelProto, file: str) -> None:
        (amax,) = (one for one in model.graph.initializer if one.name.endswith("conv1.0.conv1.bias"))
        amax.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(amax) + 1, amax.name))
        save(model, file)

    monkeypatch.setattr(writing.onnx, "save", save_another)
    for name in ("net.onnx", "new.onnx"):
        error = fails(_export(checkpoint, tmp_path / name), capsys)
        assert "what was written is not the plan: backbone_3d.conv1.0.conv1: its bias differs" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_onnx(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_away("onnx", monkeypatch)
    error = fails(_export(checkpoint, tmp_path / "net.onnx"), capsys)
    assert "deployment files need onnx, which cannot be imported (" in error
    assert error.endswith("pip install cpq_train[deploy]")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_a_file_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    main(_export(checkpoint, tmp_path / "net.onnx"))
    assert (tmp_path / "net.onnx").is_file()


def test_a_moved_pair_is_still_a_pair(checkpoint: Path, tmp_path: Path) -> None:
    main(_export(checkpoint, tmp_path / "net.onnx"))
    (tmp_path / "there").mkdir()
    for name in ("net.onnx", "net.json"):
        shutil.move(tmp_path / name, tmp_path / "there" / name)
    read_sidecar(tmp_path / "there/net.onnx")
    shutil.move(tmp_path / "there/net.onnx", tmp_path / "there/other.onnx")
    with pytest.raises(UserError, match=r"other\.onnx' has no other\.json beside it"):
        read_sidecar(tmp_path / "there/other.onnx")
