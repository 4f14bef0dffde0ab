"""A deployment file in the network's place: batches of it, and files that cannot be run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported_files import exported, forge
from old_files import CHECKPOINTS
from onnx import TensorProto, helper
from torch import Tensor

from cpq_train.common.errors import UserError
from cpq_train.export.engine import Engine
from cpq_train.export.sidecar import SCHEMA, sidecar_path
from cpq_train.training.detector import CenterPointDetector

Inputs = tuple[Tensor, Tensor, int]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    for name in ("ptq", "qat", "learned"):
        shutil.copy(CHECKPOINTS[name], folder / f"{name}.ckpt")
        exported(folder / f"{name}.ckpt", folder)
    return {name: folder / f"{name}.onnx" for name in ("ptq", "qat", "learned")}


@pytest.fixture
def engine(engines: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in (engines["qat"], sidecar_path(engines["qat"])):
        shutil.copy(file, tmp_path)
    return tmp_path / "qat.onnx"


def voxels(network: torch.nn.Module, *counts: int) -> Inputs:
    """Voxels of samples, in any order; about as many as there are lie beside one another."""
    x, y, z = network.config.grid_size
    generator = torch.Generator().manual_seed(sum(counts))
    samples = []
    for sample, count in enumerate(counts):
        cells = torch.randint(0, 40, (2 * count, 2), generator=generator) + sample
        heights = torch.randint(0, z, (2 * count, 1), generator=generator)
        zyx = torch.unique(torch.cat([heights, cells], 1), dim=0)
        zyx = zyx[torch.randperm(len(zyx), generator=generator)[:count]]
        samples.append(torch.cat([torch.full((len(zyx), 1), sample), zyx], 1))
    coords = torch.cat(samples).int()
    assert int(coords[:, 2:].max()) < min(x, y)
    coords = coords[torch.randperm(len(coords), generator=generator)]
    scale = torch.tensor([20.0, 20.0, 1.0, 60.0, 0.2])
    return torch.randn(len(coords), 5, generator=generator) * scale, coords, len(counts)


def assert_same_heads(engine: Engine, network: torch.nn.Module, inputs: Inputs) -> None:
    with torch.inference_mode():
        ours, theirs = network(*inputs), engine(*inputs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for branch, tensor in mine.items():
            assert other[branch].dtype == tensor.dtype
            assert torch.equal(tensor, other[branch]), branch


@pytest.mark.parametrize("name", ["ptq", "qat", "learned"])
def test_batches_equal_those_of_the_network(engines: dict[str, Path], name: str) -> None:
    """Samples of different sizes whose voxels are mixed, one without any."""
    network = CenterPointDetector.load_from_checkpoint(CHECKPOINTS[name]).eval().network
    engine = Engine(engines[name])
    inputs = voxels(network, 1500, 0, 600)
    assert len(torch.unique_consecutive(inputs[1][:, 0])) > 100
    assert_same_heads(engine, network, inputs)
    hm = engine(*inputs)[0]["hm"]
    assert not any(torch.equal(hm[a], hm[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert_same_heads(engine, network, voxels(network, 0, 0, 40))


def test_the_order_of_voxels_is_free(engines: dict[str, Path]) -> None:
    engine = Engine(engines["qat"])
    network = CenterPointDetector.load_from_checkpoint(CHECKPOINTS["qat"]).network
    features, coords, _ = voxels(network, 800)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        engine(features, coords, 1), engine(features[order], coords[order].long(), 1), strict=True
    ):
        assert all(torch.equal(one[branch], other[branch]) for branch in one)


def test_it_says_what_runs(engines: dict[str, Path]) -> None:
    import onnxruntime

    engine = Engine(engines["qat"])
    assert engine.describe() == {
        "name": "onnxruntime",
        "version": onnxruntime.__version__,
        "target": "portable",
        "file": str(engines["qat"]),
        "sha256": json.loads(sidecar_path(engines["qat"]).read_text())["file"]["sha256"],
    }


def test_a_detector_of_the_file_alone(engines: dict[str, Path]) -> None:
    ours = CenterPointDetector.load_from_checkpoint(CHECKPOINTS["qat"]).eval()
    theirs = CenterPointDetector.of_engine(engines["qat"]).eval()
    assert (theirs.network_config, theirs.post_processing) == (ours.network_config, ours.post_processing)
    features, coords, batch_size = voxels(ours.network, 500, 900)
    batch = {"voxel_features": features, "voxel_coords": coords, "batch_size": batch_size}
    with torch.inference_mode():
        found = [detector.detect(batch) for detector in (ours, theirs)]
    for mine, other in zip(*found, strict=True):
        assert len(mine.scores)
        assert torch.equal(mine.boxes, other.boxes)
        assert torch.equal(mine.scores, other.scores)
        assert torch.equal(mine.labels, other.labels)


def foreign() -> bytes:
    """A file that onnxruntime runs, of something else."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("image", "label")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["label"])], "g", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 17)]
    content: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return content


def with_another_output(engine: Path) -> bytes:
    model = onnx.load(str(engine))
    del model.graph.output[0]
    content: bytes = model.SerializeToString()
    return content


def edit(engine: Path, **changes: Any) -> None:
    path = sidecar_path(engine)
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def edit_in(engine: Path, name: str, **changes: Any) -> None:
    edit(engine, **{name: {**json.loads(sidecar_path(engine).read_text())[name], **changes}})


OTHER_HASH = (
    r"engine file '.*qat\.onnx' is not the one that qat\.json was written with: its SHA-256 is \w{12}…, "
)
FILE_ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (Path.unlink, r"engine file '.*qat\.onnx' does not exist"),
    "a folder": (lambda e: (e.unlink(), e.mkdir()), r"engine file '.*qat\.onnx' does not exist"),
    "truncated": (
        lambda e: e.write_bytes(e.read_bytes()[:-1000]),
        OTHER_HASH + r"expected \w{12}… \(damaged",
    ),
    "empty": (lambda e: e.write_bytes(b""), OTHER_HASH + "expected"),
    "foreign": (
        lambda e: (e.write_bytes(foreign()), sidecar_path(e).unlink()),
        r"engine file '.*qat\.onnx' has no qat\.json beside it: export writes both",
    ),
    "foreign with a sidecar": (
        lambda e: forge(e, foreign()),
        r"engine file '.*qat\.onnx' has image; its sidecar says voxel_features, voxel_coords",
    ),
    "another output": (
        lambda e: forge(e, with_another_output(e)),
        r"engine file '.*qat\.onnx' has head0\.center_z, .*; its sidecar says head0\.center, head0\.center_z",
    ),
    "garbage": (lambda e: forge(e, b"garbage" * 99), r"'.*qat\.onnx': onnxruntime cannot run it: .*INVALID"),
    "truncated with a sidecar": (
        lambda e: forge(e, e.read_bytes()[:-1000]),
        r"'.*qat\.onnx': onnxruntime cannot run it: .*INVALID",
    ),
    "nothing with a sidecar": (
        lambda e: forge(e, b""),
        r"'.*qat\.onnx': onnxruntime cannot run it: .*No graph was found",
    ),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_files_that_cannot_be_run(engine: Path, name: str) -> None:
    change, message = FILE_ERRORS[name]
    Engine(engine)
    change(engine)
    with pytest.raises(UserError, match=message) as caught:
        Engine(engine)
    assert "\n" not in str(caught.value)


def test_a_file_exchanged_for_another_export(engine: Path, engines: dict[str, Path]) -> None:
    """Of the same sizes: only the hash tells."""
    shutil.copy(engines["ptq"], engine)
    with pytest.raises(UserError, match=OTHER_HASH):
        Engine(engine)
    shutil.copy(sidecar_path(engines["ptq"]), sidecar_path(engine))
    assert Engine(engine).sidecar.checkpoint["arm"] == "ptq"


SIDECAR_ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda e: sidecar_path(e).unlink(), r"has no qat\.json beside it: export writes both, keep"),
    "no JSON": (lambda e: sidecar_path(e).write_text("{"), r"qat\.json' is no JSON: Expecting"),
    "no text": (
        lambda e: sidecar_path(e).write_bytes(b"\xff"),
        r"qat\.json' is not UTF-8 text",
    ),
    "a list": (
        lambda e: sidecar_path(e).write_text("[]"),
        r"qat\.json: got \[\], accepted: a mapping",
    ),
    "newer": (
        lambda e: edit(e, schema=SCHEMA + 1),
        r"qat\.json: schema is 2; accepted: 1: a newer cpq_train wrote it, read it with that one",
    ),
    "no schema": (lambda e: edit(e, schema=None), r"qat\.json: schema is None; accepted: 1"),
    "target": (
        lambda e: edit(e, target="gpu"),
        r"engine file '.*qat\.onnx' is of target 'gpu'; accepted: portable, portable-fast, tensorrt",
    ),
    "part": (
        lambda e: edit(e, target="tensorrt"),
        r"engine file '.*qat\.onnx' is of target 'tensorrt', a dense part alone: it runs behind",
    ),
    "file": (
        lambda e: edit(e, file={"name": "qat.onnx"}),
        r"qat\.json, file: needs 'sha256', and has name",
    ),
    "num_bytes": (lambda e: edit_in(e, "file", num_bytes=-1), r"num_bytes: got -1, accepted: a count"),
    "outputs": (
        lambda e: edit(e, outputs=[{"name": "head0.hm"}]),
        r"qat\.json, output 1: needs 'head', and has name",
    ),
    "network": (lambda e: edit_in(e, "network", depth=3), r"qat\.json: network: .* argument 'depth'"),
    "grid": (
        lambda e: edit_in(e, "network", voxel_size=[1]),
        r"qat\.json: network: voxel_size is \(1,\): exp",
    ),
    "post-processing": (
        lambda e: edit_in(e, "post_processing", nms_iou=2),
        r"qat\.json: post_processing: nms_iou is 2: expected a number between 0 and 1",
    ),
}


@pytest.mark.parametrize("name", SIDECAR_ERRORS)
def test_sidecars_that_cannot_be_used(engine: Path, name: str) -> None:
    change, message = SIDECAR_ERRORS[name]
    change(engine)
    with pytest.raises(UserError, match=message):
        Engine(engine)


KEYS = (
    *("target", "file", "checkpoint", "scheme", "coverage", "versions", "inputs", "outputs", "class_names"),
    *("head_map", "network", "data", "post_processing"),
)


@pytest.mark.parametrize("key", KEYS)
def test_sidecars_without_a_key(engine: Path, key: str) -> None:
    edit(engine, **{key: None})
    with pytest.raises(UserError, match=rf"qat\.json: needs '{key}', and has ") as caught:
        Engine(engine)
    assert str(caught.value).count(f"'{key}'") == 1


def test_keys_of_a_later_release_are_passed_over(engine: Path) -> None:
    edit(engine, remark="new")
    edit_in(engine, "file", compression="none")
    Engine(engine)


def test_the_detector_imports_neither_package() -> None:
    code = "import sys, cpq_train.training.detector; print({'onnx', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.cuda
def test_tensors_on_a_gpu_come_back_to_it(engines: dict[str, Path]) -> None:
    network = CenterPointDetector.load_from_checkpoint(CHECKPOINTS["qat"]).eval().network
    engine = Engine(engines["qat"]).cuda()
    features, coords, batch_size = voxels(network, 800)
    on_cpu, on_gpu = engine(features, coords, batch_size), engine(features.cuda(), coords.cuda(), batch_size)
    for mine, other in zip(on_cpu, on_gpu, strict=True):
        assert all(
            other[branch].is_cuda and torch.equal(mine[branch], other[branch].cpu()) for branch in mine
        )
