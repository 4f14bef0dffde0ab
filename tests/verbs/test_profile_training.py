"""Where a training step goes: `profile --training_step true`, and the steps that it times."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import fails
from old_files import CHECKPOINTS, small_options
from tiny_model import BASE, tiny_options

from cpq_train.common.lightning_private import HookedTrainer
from cpq_train.profiling.latency import Stopwatch
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main
from cpq_train.verbs.profile_training import time_steps

FLOAT, PTQ, QAT = (str(CHECKPOINTS[name]) for name in ("float", "ptq", "qat"))
CPU = torch.device("cpu")


def _document(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "training_step.json").read_text())
    return document


def test_networks_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a single pass the rows are the whole; with one thread on the clock of the processor."""
    watched, num_threads = (Quantizer.forward, Quantizer.coded), torch.get_num_threads()
    torch.set_num_threads(1)
    options = [*small_options(Path("nowhere"), tmp_path / "run"), "--num_passes", "1"]
    main(["profile", *options, FLOAT, QAT, "--training_step", "true", "--output", str(tmp_path)])
    torch.set_num_threads(num_threads)
    document, out = _document(tmp_path), capsys.readouterr().out
    assert (document["clock"], document["batches"]) == (
        "CPU time of the process",
        "this input, without boxes",
    )
    assert [network["name"] for network in document["networks"]] == ["float", "qat"]
    kinds = ["loader", "targets", *["forward"] * 4, "rulebook", "loss", *["backward"] * 5, "optimizer"]
    # In each part of a quantized network, and at the start of its pass, when weights are rounded.
    for network, more in zip(document["networks"], (0, 4), strict=True):
        ms = {row["name"]: row["ms"] for row in network["parts"]}
        assert sorted(row["kind"] for row in network["parts"]) == sorted([*kinds, *["quantizer"] * more])
        assert sum(ms.values()) + network["unattributed"]["ms"] == pytest.approx(network["whole"]["ms"])
        assert next(iter(ms)) == "loader"
        assert min(ms[name] for name in ("backbone_3d", "dense_head:backward", "optimizer")) > 0
        assert network["plain"]["ms"] > 0
    assert "qat: ms" in out
    assert (Quantizer.forward, Quantizer.coded) == watched


def test_training_batches_are_loaded(simulated_root: Path, tmp_path: Path) -> None:
    options = ["-c", BASE, *tiny_options(simulated_root, tmp_path / "run"), "--num_passes", "1"]
    main(["profile", *options, "--sample", "first", "--training_step", "true", "--output", str(tmp_path)])
    document = _document(tmp_path)
    assert (document["batches"], document["batch_size"]) == ("of training", 2)
    (network,) = document["networks"]
    assert network["parts"][0]["name"] == "loader"
    assert network["parts"][0]["ms"] > 1


def test_what_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*small_options(Path("nowhere"), tmp_path / "run"), "--training_step", "true"]
    said = fails(["profile", *options, FLOAT, PTQ], capsys)
    assert f"--training_step true and {PTQ}, of the arm ptq, which is not trained; accepted: float" in said


FILES = {"float": FLOAT, "qat": QAT}


def test_steps_are_those_of_a_fit_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three a round, in training mode, with the optimizer."""
    models = {name: CenterPointDetector.load_from_checkpoint(file).eval() for name, file in FILES.items()}
    seen: dict[str, list[int]] = {name: [] for name in models}
    order: list[str] = []
    for name, model in models.items():
        monkeypatch.setattr(
            model, "on_train_batch_start", lambda batch, _, name=name: seen[name].append(batch["number"])
        )
        monkeypatch.setattr(model, "on_fit_start", lambda name=name: order.append(name))
    norm = next(m for m in models["float"].modules() if isinstance(m, torch.nn.BatchNorm2d))
    weights = {name: model.network.dense_head.shared_conv[0].weight for name, model in models.items()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    num_before = int(norm.num_batches_tracked)
    features, coords, size = models["float"].network.example_input()
    batch = {"voxel_features": features, "voxel_coords": coords, "batch_size": size}
    batches = [{**batch, "gt_boxes": torch.zeros(1, 0, 10), "number": number} for number in range(5)]
    found = time_steps(models, lambda: batches, _new_trainer, Stopwatch(CPU), num_rounds=2)
    assert seen == {name: [0, 1, 2, 4, 0, 1] for name in models}  # each fit fetches one ahead
    assert order == ["float", "qat", "qat", "float"]
    assert norm.num_batches_tracked == num_before + 6
    for name, weight in weights.items():
        assert len(found[name].by_part) == len(found[name].plain_ms) == 2
        assert not torch.equal(weight, before[name])


_new_trainer = partial(
    HookedTrainer,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
