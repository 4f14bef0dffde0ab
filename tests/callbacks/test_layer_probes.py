"""Time and memory by layer during fit and validation: what is written when, and that nothing is left."""

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_model import BASE, tiny_options

from cpq_train.callbacks.layer_latency import LayerLatency
from cpq_train.callbacks.layer_memory import LayerMemory
from cpq_train.callbacks.layer_probe import LayerProbe
from cpq_train.callbacks.throughput import Throughput
from cpq_train.common.errors import UserError
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

CALLBACKS = {
    "layer_latency.LayerLatency": {"every_n_steps": 2, "first_step": 0, "num_logged": 3},
    "layer_memory.LayerMemory": {"every_n_steps": 2, "first_step": 1, "num_logged": 3},
    "throughput.Throughput": {},
}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _measured(rows: list[dict[str, str]]) -> list[tuple[int, str]]:
    """(step, stage) of each measured step, in their order."""
    return list(dict.fromkeys((int(row["step"]), row["stage"]) for row in rows))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with the callbacks, as a user writes it."""
    callbacks = [
        {"class_path": f"cpq_train.callbacks.{name}", "init_args": args} for name, args in CALLBACKS.items()
    ]
    path = tmp_path_factory.mktemp("config") / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "log_every_n_steps": 1}}))
    return path


@pytest.fixture(scope="module")
def run(config: Path, simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of three steps and two validation batches, then one more that resumes behind it."""
    run = tmp_path_factory.mktemp("run") / "float"
    fit = ["fit", "-c", BASE, "-c", str(config), *tiny_options(simulated_root, run)]
    main(fit)
    (run / "first.csv").write_text((run / "layer_latency.csv").read_text())
    # Steps that a run took before it fell back to its last checkpoint.
    with (run / "layer_latency.csv").open("a") as file:
        file.write("4,train,old,old,1.0\n")
    main([*fit, "--trainer.max_epochs", "2", "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    return run


def test_a_resumed_run_goes_on_with_its_file(run: Path) -> None:
    before, rows = _rows(run / "first.csv"), _rows(run / "layer_latency.csv")
    assert rows[: len(before)] == before
    assert _measured(before) == [(0, "train"), (2, "train"), (3, "validation")]
    assert _measured(rows[len(before) :]) == [(3, "train"), (5, "train"), (6, "validation")]
    assert "old" not in {row["layer"] for row in rows}


def test_every_part_of_a_training_step_has_a_row(run: Path) -> None:
    rows = [row for row in _rows(run / "layer_latency.csv") if row["step"] == "2"]
    ms = {row["layer"]: float(row["ms"]) for row in rows}
    assert len(ms) == len(rows)
    for name in (
        *("backbone_3d.conv1.0.conv1", "backbone_3d.conv_input.0:rulebook", "map_to_bev_module"),
        *("backbone_2d.concatenation", "dense_head.heads_list.5.hm.1", "targets", "loss", "backward"),
    ):
        assert ms[name] > 0
    whole = ms.pop("step")
    assert sum(ms.values()) == pytest.approx(whole)


def test_validation_has_decoding_and_no_backward(run: Path) -> None:
    names = {row["layer"] for row in _rows(run / "layer_latency.csv") if row["stage"] == "validation"}
    assert {"decode", "NMS", "backbone_2d.blocks.0.1"} <= names
    assert not {"backward", "targets"} & names


def test_memory_of_steps(run: Path) -> None:
    rows = _rows(run / "layer_memory.csv")
    assert _measured(rows) == [(1, "train"), (3, "validation"), (4, "train"), (6, "validation")]
    train = {row["layer"]: row for row in rows if row["step"] == "1"}
    assert int(train["backbone_3d.conv2.0.0"]["saved_bytes"]) > 0
    assert int(train["step"]["saved_bytes"]) == sum(
        int(row["saved_bytes"]) for name, row in train.items() if name != "step"
    )
    assert int(train["step"]["peak_bytes"]) > int(train["step"]["saved_bytes"])
    assert all(row["saved_bytes"] == "0" for row in rows if row["stage"] == "validation")


def test_the_largest_go_to_the_logger(run: Path) -> None:
    rows = _rows(run / "metrics.csv")
    for kind in ("latency_ms", "val/latency_ms", "memory_mib", "val/memory_mib"):
        logged = [
            [name for name, value in row.items() if value and name.startswith(f"{kind}/")] for row in rows
        ]
        assert {len(names) for names in logged} == {0, 3}
    assert "latency_ms/step" not in rows[0]


def test_throughput_is_logged(run: Path) -> None:
    rows = _rows(run / "metrics.csv")
    speed = [float(row["throughput/samples_per_s"]) for row in rows if row["throughput/samples_per_s"]]
    waits = [float(row["throughput/data_wait_share"]) for row in rows if row["throughput/data_wait_share"]]
    assert len(speed) == len(waits) >= 3
    assert all(value > 0 for value in speed)
    assert all(0 <= value < 1 for value in waits)


def test_validate_writes_rows_of_its_own_once(run: Path, config: Path, simulated_root: Path) -> None:
    fit_rows = [r for r in _rows(run / "layer_latency.csv") if r["stage"] != "validate"]
    weights = ("--model.weights", str(run / "checkpoints/last.ckpt"))
    for _ in range(2):
        main(["validate", "-c", BASE, "-c", str(config), *tiny_options(simulated_root, run), *weights])
    rows = _rows(run / "layer_latency.csv")
    assert [r for r in rows if r["stage"] != "validate"] == fit_rows
    names = Counter(r["layer"] for r in rows if r["stage"] == "validate")
    assert set(names.values()) == {1}


def _step(probe: LayerProbe, trainer: Any, module: CenterPointDetector) -> int:
    """Hooks that are there while a step runs."""
    probe.on_train_batch_start(trainer, module, {}, 0)
    count = sum(len(m._forward_hooks) for m in module.network.modules())
    probe.on_train_batch_end(trainer, module, None, {}, 0)
    assert sum(len(m._forward_hooks) for m in module.network.modules()) == 0
    return count


@pytest.mark.parametrize("kind", [LayerLatency, LayerMemory])
def test_hooks_are_there_in_measured_steps_of_rank_0_only(kind: type[LayerProbe], tmp_path: Path) -> None:
    module = CenterPointDetector()
    module.network = torch.nn.Sequential(torch.nn.ReLU())  # type: ignore[assignment]
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, default_root_dir=str(tmp_path), loggers=[])
    probe = kind(every_n_steps=3, first_step=2)
    assert [bool(_step(probe, trainer, module)) for _ in range(9)] == [n % 3 == 2 for n in range(9)]
    trainer.is_global_zero = False
    assert [_step(kind(1, 0, 1), trainer, module) for _ in range(2)] == [0, 0]


def test_an_exception_takes_the_hooks_away(tmp_path: Path) -> None:
    module = CenterPointDetector()
    module.network = torch.nn.Sequential(torch.nn.ReLU())  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=0, default_root_dir=str(tmp_path))
    for probe in (LayerLatency(1, 0, 1), LayerMemory(1, 0, 1)):
        probe.on_train_batch_start(trainer, module, {}, 0)
        probe.on_exception(trainer, module, KeyboardInterrupt())
        assert not module.network[0]._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize("setting", ["every_n_steps", "first_step", "num_logged"])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(UserError, match=f"LayerMemory: {setting} is -1"):
        LayerMemory(**{setting: -1})


def test_throughput_leaves_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    logged: dict[str, float] = {}
    monkeypatch.setattr("cpq_train.callbacks.throughput.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(
        "cpq_train.callbacks.throughput.log_equal", lambda module, values: logged.update(values)
    )
    trainer: Any = SimpleNamespace(world_size=2, global_step=2, log_every_n_steps=2)
    probe, module = Throughput(), CenterPointDetector()
    batch = {"batch_size": 4}

    def step(wait_s: float, run_s: float) -> None:
        now[0] += wait_s
        probe.on_train_batch_start(trainer, module, batch, 0)
        now[0] += run_s
        probe.on_train_batch_end(trainer, module, None, batch, 0)

    probe.on_train_start(trainer, module)
    trainer.global_step = 1
    step(100.0, 3.0)  # the wait for the first batch is the start of the loaders
    probe.on_validation_start(trainer, module)
    step(50.0, 2.0)
    trainer.global_step = 2
    step(1.0, 4.0)
    assert logged == {"throughput/samples_per_s": 3 * 4 * 2 / 10, "throughput/data_wait_share": 0.1}
