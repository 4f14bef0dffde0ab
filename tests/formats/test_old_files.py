"""What earlier releases wrote loads, resumes and compares; what a newer one wrote is refused."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from old_files import CHECKPOINTS, SCHEMA_1, as_said_today, small_options
from own_network import FOLDER as SCHEMA_2
from own_network import OwnNetwork, voxels

import cpq_train
from cpq_train.arms.description import Description
from cpq_train.common.errors import UserError
from cpq_train.evaluation.matches import read_matches
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.export.planning import plan_of
from cpq_train.export.portable.writer import portable_graph
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.profiling.latency_file import read_latency
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.scheme import KINDS, Scheme
from cpq_train.quantization.trace import trace
from cpq_train.quantization.wiring import Wiring
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")

RUNS = ("float", "float_tuned", "ptq", "qat")


@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_load(
    name: str, weights_only: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder without their weights, their schemes and their data."""
    monkeypatch.chdir(tmp_path)
    detector = CenterPointDetector.load_from_checkpoint(CHECKPOINTS[name], weights_only=weights_only)
    content = torch.load(CHECKPOINTS[name], weights_only=True)
    assert detector.subject.arm == content["quantization"]["arm"]
    said = detector.subject.describe()
    wiring = said.pop("wiring")
    assert said == as_said_today(content["quantization"])
    _check_wiring(wiring, said, detector.network_config)
    state = detector.state_dict()
    assert state.keys() == content["state_dict"].keys()
    for key, value in content["state_dict"].items():
        assert torch.equal(state[key], value), key
    assert detector.hparams["post_processing"]["score_threshold"] == 0.03


def _check_wiring(wiring: dict[str, Any] | None, said: dict[str, Any], config: NetworkConfig) -> None:
    """An old file does not say it: it has gone by older rules, which find what running the network finds."""
    if said["arm"] == "float":
        assert wiring is None
        return
    network = CenterPoint(config)
    found = trace(network, network.example_input())
    assert wiring["folds"] == found.folds
    groups = set(map(tuple, wiring["one_tensor"]))
    assert groups == (set() if said["scheme"] is None else set(found.one_tensor))


PORTABLE_FILES = {
    "ptq": "9708699d32e0c255aff8ab107d88a1f4bde3f01c2213d28658198973ccfe25bd",
    "qat": "cc5e59e1a2e990f3cc47616d44c85fa6246f486bf89bed2fedbd654c091b66da",
}
"""SHA-256 of what the first release with `export` wrote of these checkpoints, of version and text apart."""


@pytest.mark.parametrize("name", PORTABLE_FILES)
def test_portable_files_are_what_they_were(name: str) -> None:
    """Byte for byte: a file of then is read, verified and run by what reads those of today."""
    network = CenterPointDetector.load_from_checkpoint(CHECKPOINTS[name]).network
    model = portable_graph(plan_of(network)).model("centerpoint", "0", "")
    assert hashlib.sha256(model.SerializeToString()).hexdigest() == PORTABLE_FILES[name]


def test_runs_compare(tmp_path: Path) -> None:
    main(["compare", *(str(SCHEMA_1 / run) for run in RUNS), "--output", str(tmp_path)])
    new, old = (
        json.loads(f.read_text()) for f in (tmp_path / "report.json", SCHEMA_1 / "report/report.json")
    )
    for now, then in zip(new["runs"], old["runs"], strict=True):
        for key in ("arm", "metrics", "confidence", "gap_to_float", "ptq_loss_won_back", "coverage"):
            assert now[key] == then[key], (now["name"], key)
    assert new["schema"] == old["schema"]
    assert new["postprocessing_sha256"] == old["postprocessing_sha256"]


def test_times_are_compared(tmp_path: Path) -> None:
    """Those of the runs whose checkpoints were measured; what was measured beside them is shown too."""
    latency = ["--latency", str(SCHEMA_1 / "latency.json")]
    main(["compare", *(str(SCHEMA_1 / run) for run in RUNS), "--output", str(tmp_path), *latency])
    report = json.loads((tmp_path / "report.json").read_text())
    measured = {run["arm"]: run["latency"] for run in report["runs"]}
    assert {arm: row and row["runs_as"] for arm, row in measured.items()} == {
        "float": "PyTorch, float",
        "float_tuned": None,
        "ptq": "PyTorch, fake quantization",
        "qat": "PyTorch, fake quantization",
    }
    assert measured["float"]["ratio_to_float"] == 1
    assert [run["profile"].get("num_macs") for run in report["runs"]] == [23149236, None, 23149236, 23149236]


def test_a_run_goes_on(simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its own config.yaml, class paths included, in a folder where its weights and scheme are not."""
    run = tmp_path / "qat"
    shutil.copytree(SCHEMA_1 / "qat", run)
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for path in (config["model"]["weights"], config["model"]["scheme"]):
        assert not Path(path).exists()
    assert config["trainer"]["strategy"]["class_path"] == "cpq_train.strategy.QuantDDPStrategy"
    options = [*small_options(simulated_root, run, "qat"), "--trainer.max_epochs", "2"]
    main(["fit", *options, "--ckpt_path", "last"])
    before, after = (
        torch.load(f, weights_only=True) for f in (CHECKPOINTS["qat"], run / "checkpoints/last.ckpt")
    )
    assert after["global_step"] == 2 * before["global_step"]
    del after["quantization"]["wiring"]
    assert after["quantization"] == as_said_today(before["quantization"])
    assert after["data"]["num_sweeps"] == 2
    amax = [name for name in before["state_dict"] if name.endswith("_amax")]
    assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in amax)


@pytest.mark.parametrize("name", ["qat", "learned"])
def test_a_run_is_scored(
    name: str, simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--ckpt_path`, which needs no other file."""
    monkeypatch.chdir(tmp_path)
    options = small_options(simulated_root, tmp_path / "run", name)
    main(["validate", *options, "--ckpt_path", str(CHECKPOINTS[name])])
    now, then = (read_metrics(folder / "metrics.json") for folder in (tmp_path / "run", SCHEMA_1 / name))
    assert now["metrics"] == then["metrics"]
    assert now["arm"] == "qat"
    new, old = (read_matches(folder / "matches.npz") for folder in (tmp_path / "run", SCHEMA_1 / name))
    assert len(old.pred_score)
    assert np.array_equal(new.pred_score, old.pred_score)


def test_verify_counts_as_then(simulated_root: Path, tmp_path: Path) -> None:
    options = ["--root", str(simulated_root), "--num_sweeps", "2", "--output", str(tmp_path / "verify.json")]
    main(["verify", str(CHECKPOINTS["qat"]), *options])
    now, then = (json.loads(f.read_text()) for f in (tmp_path / "verify.json", SCHEMA_1 / "verify.json"))
    assert now == {**then, "checkpoint": now["checkpoint"]}


OLD_KINDS = ("SubMConv3d", "SparseConv3d", "Conv2d", "ConvTranspose2d", "ResidualAdd")


def test_only_in_schema_1_do_the_kinds_of_then_mean_all() -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    assert content["quantization"]["scheme"]["rules"][0]["kinds"] == list(OLD_KINDS)
    assert Description.of(content, "old.ckpt").scheme.rules[0].kinds == KINDS
    content["quantization"]["schema"] = 2
    assert Description.of(content, "new.ckpt").scheme.rules[0].kinds == OLD_KINDS
    rule = {"layers": "*", "kinds": list(OLD_KINDS), "bias": "fp16"}
    assert Scheme.from_dict({"rules": [rule]}).rules[0].kinds == OLD_KINDS
    content["quantization"].update(schema=1, scheme={"rules": [{**rule, "kinds": list(OLD_KINDS[:4])}]})
    assert Description.of(content, "old.ckpt").scheme.rules[0].kinds == OLD_KINDS[:4]


def _newer_checkpoint(folder: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    content["quantization"]["schema"] = 3
    torch.save(content, folder / "newer.ckpt")
    CenterPointDetector.load_from_checkpoint(folder / "newer.ckpt")


def _newer_metrics(folder: Path) -> None:
    document = json.loads((SCHEMA_1 / "ptq/metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**document, "schema": 2}))
    read_metrics(folder / "metrics.json")


def _newer_matches(folder: Path) -> None:
    with np.load(SCHEMA_1 / "ptq/matches.npz") as stored:
        np.savez(folder / "matches.npz", **{**stored, "schema": 2})
    read_matches(folder / "matches.npz")


def _newer_latency(folder: Path) -> None:
    document = json.loads((SCHEMA_1 / "latency.json").read_text())
    (folder / "latency.json").write_text(json.dumps({**document, "schema": 2}))
    read_latency(folder / "latency.json")


@pytest.mark.parametrize("read_newer", [_newer_checkpoint, _newer_metrics, _newer_matches, _newer_latency])
def test_a_newer_schema_is_refused(read_newer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schema is [23]; accepted: 1( to 2)?: a newer cpq_train wrote it"):
        read_newer(tmp_path)


@pytest.mark.parametrize("schema", [None, 0, "1", True])
def test_what_is_no_schema_is_refused(schema: Any, tmp_path: Path) -> None:
    content = torch.load(CHECKPOINTS["ptq"], weights_only=True)
    content["quantization"]["schema"] = schema
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=rf"schema is {schema!r}; accepted: 1 to 2$"):
        CenterPointDetector.load_from_checkpoint(tmp_path / "odd.ckpt")


# Schema 2, which came with networks of others


def test_a_network_of_others_loads_without_an_example() -> None:
    """BatchNorm is kept, folded or unfoldable as the file says; a layer never called stays float."""
    file = SCHEMA_2 / "own.ckpt"
    network = cpq_train.load(file, OwnNetwork()).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            network(*voxels()), torch.load(SCHEMA_2 / "own_output.pt"), rtol=0, atol=1e-5
        )
    assert cpq_train.coverage(network).left_in_float == {
        "unused": "never called on the example input",
        "scale": "this kind of layer is not quantized",
        "norm_first": "cannot be folded: it reads no layer's output",
    }
    said = torch.load(file)["quantization"]["wiring"]
    assert prepared_of(network).wiring == Wiring.from_dict(said)
    found = trace(OwnNetwork(), voxels())  # of other weights: the ranges of what is reused are others
    assert Wiring.from_dict(said) == replace(found, reused=Wiring.from_dict(said).reused)
    assert found.reused.keys() == said["reused"].keys()
    assert torch.load(file)["quantization"]["network"] == "OwnNetwork"
    cpq_train.fold(network)
    assert sum(report.num_mismatched for report in cpq_train.verify(network, voxels())) == 0
