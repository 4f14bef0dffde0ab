"""`profile` of several checkpoints and an engine, as a user runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import fails
from exported_files import DATA
from old_files import CHECKPOINTS, SCHEMA_1, small_options

from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.profiling.latency_file import read_latency
from cpq_train.verbs.cli import main
from cpq_train.verbs.profile_input import ProfileSettings
from cpq_train.verbs.profile_several import profile_several

FLOAT, PTQ, QAT = (str(CHECKPOINTS[name]) for name in ("float", "ptq", "qat"))


def _options(tmp_path: Path) -> list[str]:
    return [*small_options(Path("nowhere"), tmp_path / "run"), "--num_passes", "2"]


def _changed(folder: Path, name: str = "ptq", **entries: Any) -> str:
    """A checkpoint of which entries below `data`, `network` or `post_processing` are others."""
    content = torch.load(CHECKPOINTS[name], weights_only=True)
    for entry, values in entries.items():
        holder = content if entry == "data" else content["hyper_parameters"]
        holder[entry] = {**holder.get(entry, {}), **values}
    path = folder / f"{len(list(folder.iterdir()))}_{name}.ckpt"
    torch.save(content, path)
    return str(path)


def test_checkpoints_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two float networks among them, which get different names."""
    output, copy = tmp_path / "profile", tmp_path / "copy.ckpt"
    shutil.copy(FLOAT, copy)
    main(["profile", *_options(tmp_path), FLOAT, PTQ, str(copy), "--output", str(output)])
    out = capsys.readouterr().out
    document = read_latency(output / "latency.json")
    rows = document["rows"]
    assert [row["name"] for row in rows] == ["float", "ptq", "float_2"]
    assert [row["arm"] for row in rows] == ["float", "ptq", "float"]
    assert [row["file"] for row in rows] == [FLOAT, PTQ, str(copy)]
    assert [row["runs_as"] for row in rows] == [
        "PyTorch, float",
        "PyTorch, fake quantization",
        "PyTorch, float",
    ]
    assert (document["input"], document["device"], document["num_passes"]) == ("synthetic", "cpu", 2)
    for row in rows:
        assert row["sha256"] == sha256_of(row["file"])
        assert 0 < row["min_ms"] <= row["ms"] <= row["max_ms"]
        assert row["cpu_ms"] > 0
        summary = json.loads((output / row["name"] / "profile.json").read_text())["summary"]
        assert (summary["arm"], summary["weights"]) == (row["arm"], row["file"])
        assert row["summary"].items() <= summary.items()
        assert {"num_macs", "training_peak_bytes", "stored_bytes"} <= row["summary"].keys()
        assert "latency_ms" not in row["summary"]
        for name in ("latency.csv", "memory.csv", "storage.csv", "modules.txt"):
            assert (output / row["name"] / name).is_file()
    assert rows[1]["summary"]["stored_bytes"] < rows[0]["summary"]["stored_bytes"]
    assert "measured in turn in one process" in out
    assert "Latency by layer" not in out


def test_compare_takes_the_file(tmp_path: Path) -> None:
    output, report = tmp_path / "profile", tmp_path / "report"
    main(["profile", FLOAT, QAT, *_options(tmp_path), "--output", str(output)])
    runs = [str(SCHEMA_1 / name) for name in ("float", "qat")]
    main(["compare", *runs, "--output", str(report), "--latency", str(output / "latency.json")])
    rows = read_latency(output / "latency.json")["rows"]
    found = json.loads((report / "report.json").read_text())["runs"]
    assert found[1]["latency"]["ratio_to_float"] == rows[1]["ms"] / rows[0]["ms"]
    assert "| qat | PyTorch, fake quantization |" in (report / "report.md").read_text()


def test_checkpoints_describe_themselves(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Without a configuration the grid is theirs, and the data are those of the first that says so."""
    stating = _changed(tmp_path, data=_DATA)
    output = ["--output", str(tmp_path / "a"), "--num_passes", "1", "--trainer.accelerator", "cpu"]
    main(["profile", FLOAT, stating, *output])
    assert 0 < read_latency(tmp_path / "a/latency.json")["num_voxels"] <= 700
    assert not any("data.voxel_size is" in str(warning.message) for warning in recwarn)
    main(["profile", FLOAT, stating, *output, "--data.max_num_voxels_eval", "300"])
    assert read_latency(tmp_path / "a/latency.json")["num_voxels"] == 300
    assert any("data.max_num_voxels_eval is 300" in str(warning.message) for warning in recwarn)


_DATA = {**DATA, "max_num_voxels_train": 500, "max_num_voxels_eval": 700}


def test_a_scored_run_keeps_its_metrics(tmp_path: Path) -> None:
    """The file of several networks is for `compare`; no run is written to but with `--model.weights`."""
    shutil.copytree(CHECKPOINTS["ptq"].parent, tmp_path / "ptq")
    before = read_metrics(tmp_path / "ptq/metrics.json")
    main(["profile", *_options(tmp_path), str(tmp_path / "ptq/ptq.ckpt"), "--output", str(tmp_path)])
    assert read_metrics(tmp_path / "ptq/metrics.json") == before
    assert (tmp_path / "ptq/profile.json").is_file()


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    main(["profile", *_options(tmp_path), FLOAT])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "qat.onnx"
    path.write_bytes(b"onnx" * 10)
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"network": {"class_names": ("car", "bicycle", "motorcycle")}}, "model.network.class_names is ("),
        ({"post_processing": {"nms_pre": 500}}, "model.post_processing.nms_pre is 1000 and 500;"),
        ({"data": {**_DATA, "num_sweeps": 3}}, "data.num_sweeps is 2 and 3;"),
        ({"data": {**_DATA, "max_num_voxels_eval": 9}}, "data.max_num_voxels_eval is 700 and 9;"),
    ],
)
def test_checkpoints_that_differ(
    entries: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first = _changed(folder, "qat", data=_DATA)
    other = _changed(folder, **entries)
    output = ["--output", str(tmp_path / "out")]
    said = fails(["profile", *_options(tmp_path), FLOAT, first, other, *output], capsys)
    assert message in said
    assert f"'{other}' cannot be measured side by side" in said
    assert not (tmp_path / "out").exists()


def test_checkpoints_may_differ_in_what_training_has(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    first = _changed(folder, "float", data=_DATA)
    changes = {"network": {"backbone_bn_momentum": 0.1}, "data": {**_DATA, "max_num_voxels_train": 9}}
    main(["profile", *_options(tmp_path), first, _changed(folder, "float", **changes)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([FLOAT, "--model.weights", PTQ], f"checkpoints {FLOAT} and model.weights {PTQ} are both given"),
        ([FLOAT, PTQ, FLOAT], f"{FLOAT} and {FLOAT} are one checkpoint: accepted: each file once"),
        ([FLOAT, "absent.ckpt"], "checkpoint 'absent.ckpt' does not exist"),
        (["--engine_file", "a.onnx"], "--engine_file a.onnx is measured beside checkpoints, and none is"),
        ([FLOAT, "--num_passes", "0"], "--num_passes is 0: expected 1 or more"),
        ([FLOAT, "--ckpt_path", PTQ], "model.weights or a list of checkpoints, not from --ckpt_path"),
        ([FLOAT, "--cloud", "nothing.bin"], "cloud nothing.bin cannot be read"),
    ],
)
def test_bad_input(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert message in fails(["profile", *_options(tmp_path), *output, *options], capsys)
    assert not (tmp_path / "out").exists()


def test_an_engine_beside_networks_on_another_device(tmp_path: Path, engine_file: Path) -> None:
    settings = ProfileSettings(checkpoints=[Path(QAT)], engine_file=engine_file)
    with pytest.raises(
        UserError, match=r"runs on the CPU, the checkpoints on cuda: accepted: --trainer\.acc"
    ):
        profile_several(None, settings, torch.device("cuda"))
