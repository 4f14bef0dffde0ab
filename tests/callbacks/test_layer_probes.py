"""Time and memory by layer during fit and validation: what is written when, and that nothing is left."""

import csv
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from tiny_model import BASE, tiny_options

from cpq_train.callbacks.layer_latency import LayerLatency
from cpq_train.callbacks.layer_memory import LayerMemory
from cpq_train.callbacks.layer_probe import LayerProbe
from cpq_train.callbacks.throughput import Throughput
from cpq_train.common.errors import UserError
from cpq_train.loggers import StartLoggers
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main
from cpq_train.verbs.lightning_cli import QuantCLI

CALLBACKS = {
    "cpq_train.callbacks.layer_latency.LayerLatency": {"every_n_steps": 2, "first_step": 0, "num_logged": 3},
    "LayerMemory": {"every_n_steps": 2, "first_step": 1, "num_logged": 3},
    "Throughput": {"every_n_steps": 2},
}
"""By the path that older configurations have, and by their short names."""


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _measured(rows: list[dict[str, str]]) -> list[tuple[int, str]]:
    """(step, stage) of each measured step, in their order."""
    return list(dict.fromkeys((int(row["step"]), row["stage"]) for row in rows))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with the callbacks, as a user writes it."""
    callbacks = [{"class_path": name, "init_args": args} for name, args in CALLBACKS.items()]
    path = tmp_path_factory.mktemp("config") / "callbacks.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
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


def test_those_that_are_named_take_the_place_of_the_default_ones(run: Path) -> None:
    """Each layer of a measured step once, and the settings of those that are named."""
    for file in ("layer_latency.csv", "layer_memory.csv"):
        names = [(row["step"], row["stage"], row["layer"]) for row in _rows(run / file)]
        assert len(set(names)) == len(names)
    assert [int(row["step"]) for row in _rows(run / "throughput.csv")] == [1, 2, 3, 5]


def test_the_last_that_is_named_counts() -> None:
    """Of the classes of our own; others may be there several times."""
    cli: Any = object.__new__(QuantCLI)
    stops = [EarlyStopping("val/NDS"), EarlyStopping("val/mAP")]
    named = [LayerLatency(1), stops[0], LayerLatency(2), stops[1], LearningRateMonitor("epoch")]
    own = [LayerLatency(), LayerMemory()]
    assert cli.callbacks_of_run(named, own, False) == [*stops[:1], *named[2:], own[1]]
    *most, own_memory = cli.callbacks_of_run(named, own, True)
    assert [type(one) for one in most[-2:]] == [LearningRateMonitor, StartLoggers]
    assert own_memory is own[1]


def test_every_run_is_measured(arms: dict[str, Path]) -> None:
    """By default, in a step of each interval that the other does not measure, and in what `validate` runs."""
    for arm in ("float", "qat", "float_tuned"):
        assert _measured(_rows(arms[arm] / "layer_latency.csv")) == [(0, "train"), (3, "validation")]
        assert _measured(_rows(arms[arm] / "layer_memory.csv")) == [(1, "train"), (3, "validation")]
        (row,) = _rows(arms[arm] / "throughput.csv")
        assert row["step"] == "2"
    assert _measured(_rows(arms["ptq"] / "layer_latency.csv")) == [(0, "validate")]
    assert _measured(_rows(arms["ptq"] / "layer_memory.csv")) == [(0, "validate")]
    assert not (arms["ptq"] / "throughput.csv").exists()


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


def test_metrics_csv_has_whole_steps_alone(run: Path) -> None:
    """A validation at the step of its scores; W&B gets layers too, see its tests."""
    rows = _rows(run / "metrics.csv")
    expected = {"latency_ms": ["0", "2", "3", "5"], "memory_mib": ["1", "4"]}
    for kind, steps in expected.items():
        assert [name for name in rows[0] if kind in name] == [f"{kind}/step", f"val/{kind}/step"]
        assert [row["step"] for row in rows if row[f"{kind}/step"]] == steps
        assert [row["step"] for row in rows if row[f"val/{kind}/step"]] == ["2", "5"]
    whole = [row for row in _rows(run / "layer_memory.csv") if row["layer"] == "step"]
    logged = next(float(row["memory_mib/step"]) for row in rows if row["memory_mib/step"])
    assert logged == int(whole[0]["peak_bytes"]) / 2**20


def test_throughput_is_logged(run: Path) -> None:
    rows = _rows(run / "metrics.csv")
    logged = [
        {name: row[f"throughput/{name}"] for name in ("samples_per_s", "data_wait_share")}
        | {"step": row["step"]}
        for row in rows
        if row["throughput/samples_per_s"]
    ]
    assert logged == _rows(run / "throughput.csv")
    assert all(float(row["samples_per_s"]) > 0 for row in logged)
    assert all(0 <= float(row["data_wait_share"]) < 1 for row in logged)


def test_validate_writes_rows_of_its_own_once(run: Path, config: Path, simulated_root: Path) -> None:
    fit_rows = [r for r in _rows(run / "layer_latency.csv") if r["stage"] != "validate"]
    weights = ("--model.weights", str(run / "checkpoints/last.ckpt"))
    for _ in range(2):
        main(["validate", "-c", BASE, "-c", str(config), *tiny_options(simulated_root, run), *weights])
    rows = _rows(run / "layer_latency.csv")
    assert [r for r in rows if r["stage"] != "validate"] == fit_rows
    names = Counter(r["layer"] for r in rows if r["stage"] == "validate")
    assert set(names.values()) == {1}


@pytest.mark.parametrize("num_batches", range(1, 40))
def test_an_interval_of_any_length_is_measured(num_batches: int) -> None:
    """Behind the warm-up where it has one, in two steps where it has them, the last left to AmaxDrift."""
    measured = [
        [n for n in range(num_batches) if probe.is_due(n, num_batches)]
        for probe in (LayerLatency(), LayerMemory())
    ]
    firsts = (min(10, max(num_batches - 3, 0)), min(11, max(num_batches - 2, 1), num_batches - 1))
    assert measured == [[first] for first in firsts]
    assert num_batches == 1 or firsts[0] != firsts[1]


def test_a_long_interval_is_measured_again_and_again() -> None:
    assert [n for n in range(1200) if LayerLatency().is_due(n, 1200)] == [10, 510, 1010]
    assert [n for n in range(1200) if LayerMemory(every_n_steps=1000).is_due(n, math.inf)] == [11, 1011]
    assert not any(LayerMemory(every_n_steps=None).is_due(n, 1200) for n in range(1200))


def _fit(**settings: Any) -> Any:
    """A trainer in a fit of 8 batches an epoch."""
    stated = {"num_training_batches": 8, "val_check_batch": 8, "check_val_every_n_epoch": 1}
    return SimpleNamespace(**{**stated, "current_epoch": 0, **settings})


@pytest.mark.parametrize(
    ("trainer", "place"),
    [
        (_fit(current_epoch=3), (5, 8)),
        (_fit(val_check_batch=4), (1, 4)),
        (_fit(check_val_every_n_epoch=6, current_epoch=9), (3 * 8 + 5, 6 * 8)),
        (_fit(check_val_every_n_epoch=None, val_check_batch=20, current_epoch=1), (5, 8)),
        (_fit(val_check_batch=None), (5, 8)),
    ],
)
def test_the_place_in_an_interval(trainer: Any, place: tuple[int, int]) -> None:
    assert LayerLatency()._place(trainer, 5) == place


def test_an_interval_ends_with_the_fit() -> None:
    probe = LayerLatency()
    trainer = _fit(estimated_stepping_batches=3, accumulate_grad_batches=2, is_global_zero=False)
    trainer.default_root_dir, trainer.global_step = "", 0
    probe.on_train_start(trainer, CenterPointDetector())
    assert probe._place(trainer, 5) == (5, 6)


def test_a_validation_that_comes_again_replaces_its_rows(tmp_path: Path) -> None:
    """The one before which a run was saved; what came before it stays."""
    file = tmp_path / "layer_latency.csv"
    rows = ["2,train", "3,validation", "5,train", "6,validation", "0,validate"]
    file.write_text("step,stage,layer,kind,ms\n" + "".join(f"{row},a,b,1.0\n" for row in rows))
    trainer: Any = SimpleNamespace(
        is_global_zero=True, global_step=6, default_root_dir=str(tmp_path), sanity_checking=False
    )
    trainer.state = SimpleNamespace(fn="fit")
    LayerLatency().on_validation_start(trainer, CenterPointDetector())
    assert _measured(_rows(file)) == [(2, "train"), (3, "validation"), (5, "train"), (0, "validate")]


def _step(probe: LayerProbe, trainer: Any, module: CenterPointDetector, batch_idx: int = 0) -> int:
    """Hooks that are there while a step runs."""
    probe.on_train_batch_start(trainer, module, {}, batch_idx)
    count = sum(len(m._forward_hooks) for m in module.network.modules())
    probe.on_train_batch_end(trainer, module, None, {}, 0)
    assert sum(len(m._forward_hooks) for m in module.network.modules()) == 0
    return count


@pytest.mark.parametrize("kind", [LayerLatency, LayerMemory])
def test_hooks_are_there_in_measured_steps_of_rank_0_only(kind: type[LayerProbe], tmp_path: Path) -> None:
    module = CenterPointDetector()
    module.network = torch.nn.Sequential(torch.nn.ReLU())  # type: ignore[assignment]
    trainer = _fit(num_training_batches=12, is_global_zero=True, global_step=0, loggers=[])
    trainer.default_root_dir = str(tmp_path)
    probe = kind(every_n_steps=3, first_step=2)
    assert [bool(_step(probe, trainer, module, n)) for n in range(8)] == [n % 3 == 2 for n in range(8)]
    trainer.is_global_zero = False
    assert [_step(kind(1, 0, 1), trainer, module) for _ in range(2)] == [0, 0]


def test_an_exception_takes_the_hooks_away(tmp_path: Path) -> None:
    module = CenterPointDetector()
    module.network = torch.nn.Sequential(torch.nn.ReLU())  # type: ignore[assignment]
    trainer = _fit(is_global_zero=True, global_step=0, default_root_dir=str(tmp_path))
    for probe in (LayerLatency(1, 0, 1), LayerMemory(1, 0, 1)):
        probe.on_train_batch_start(trainer, module, {}, 0)
        probe.on_exception(trainer, module, KeyboardInterrupt())
        assert not module.network[0]._forward_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize("setting", ["every_n_steps", "first_step", "num_logged"])
def test_bad_settings(setting: str) -> None:
    with pytest.raises(UserError, match=rf"layer_memory\.{setting} is -1: expected"):
        LayerMemory(**{setting: -1})


def test_bad_interval_of_throughput() -> None:
    with pytest.raises(UserError, match=r"throughput\.every_n_steps is 0: expected 1 or more, or null"):
        Throughput(0)


class Recorder:
    """A logger."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


@pytest.mark.parametrize("every_n_steps", [2, None])
def test_throughput_leaves_validation_out(
    every_n_steps: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two batches each, one more before a validation and one behind it; every second is due."""
    now = [0.0]
    monkeypatch.setattr("cpq_train.callbacks.throughput.time.perf_counter", lambda: now[0])
    logger = Recorder()
    trainer: Any = SimpleNamespace(world_size=2, global_step=0, is_global_zero=True, loggers=[logger])
    trainer.default_root_dir = str(tmp_path)
    probe, module = Throughput(every_n_steps), CenterPointDetector()
    batch = {"batch_size": 4}

    def step(wait_s: float, run_s: float) -> None:
        now[0] += wait_s
        probe.on_train_batch_start(trainer, module, batch, 0)
        now[0] += run_s
        probe.on_train_batch_end(trainer, module, None, batch, 0)

    probe.on_train_start(trainer, module)
    step(100.0, 3.0)  # the wait for the first batch is the start of the loaders
    trainer.global_step = 1
    step(0.0, 1.0)
    step(1.0, 3.0)
    trainer.global_step = 2
    step(0.0, 2.0)
    step(0.0, 1.0)
    trainer.global_step = 3
    step(2.0, 1.0)
    probe.on_validation_start(trainer, module)
    trainer.global_step = 4
    step(50.0, 2.0)
    probe.on_train_end(trainer, module)
    probe.on_train_end(trainer, module)
    expected = [(1, 4 * 4 * 2 / 10, 0.1), (2, 2 * 4 * 2 / 4, 0.5), (3, 2 * 4 / 2, 0.0)]
    logged = [(step, *metrics.values()) for step, metrics in logger.logged]
    assert logged == (expected if every_n_steps else [])
    assert (tmp_path / "throughput.csv").exists() == bool(every_n_steps)
