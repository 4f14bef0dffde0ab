"""The check that proves the GPU's path: whole on the CPU, where all of it is small; its guard, its page."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpq_train.common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module", autouse=True)
def scripts_are_found() -> Iterator[None]:
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield
    sys.path[:] = path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("check")
    command = ["bash", "scripts/gpu_check.sh", "--device", "cpu", "--output", str(folder)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| CUDA graph | not applicable: no stream to capture |" in done.stdout
    from gpu_checking.page import page_of

    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    assert (folder / "gpu.md").read_text() == page_of(found)
    return found


def test_every_part_has_a_result(record: dict[str, Any]) -> None:
    from gpu_checking.parts import PARTS

    outcomes = record["parts"]
    assert list(outcomes) == [part.name for part in PARTS]
    bare = {name: outcome["message"] for name, outcome in outcomes.items() if not outcome["rows"]}
    assert bare == {"ranks": "no GPU", "graph": "no stream to capture"}
    assert {outcome["result"] for name, outcome in outcomes.items() if name not in bare} == {"passed"}
    (verified,) = outcomes["verify_quickstart"]["rows"]
    assert verified["codes"] > 1e5
    assert verified["differing"] == verified["one step apart"] == 0
    steps = {row["arm"]: row for row in outcomes["steps"]["rows"]}
    assert {"float", "float bf16", "QAT", "QAT, learned ranges", "pytorch-quantization"} <= steps.keys()
    counts = {row["arm"]: row for row in outcomes["counts"]["rows"]}
    assert {"float", "QAT", "QAT, learned ranges"} <= counts.keys()
    assert all(row["operators"] > 100 for row in counts.values())


def test_no_figure_is_left_off_the_page(record: dict[str, Any]) -> None:
    from gpu_checking.page import page_of
    from results import table_of

    page = page_of(record)
    for outcome in record["parts"].values():
        assert table_of(outcome["rows"]) in page
        assert f" {outcome['seconds']:.2f} |" in page
    assert all(str(version) in page for version in record["versions"].values())
    bounds = page.partition("## Bounds")[2].partition("## ")[0]
    assert len(re.findall(r"^\| .* \| (yes|no) \|$", bounds, re.MULTILINE)) == 5


def test_the_record_has_no_path_of_this_machine(record: dict[str, Any]) -> None:
    text = json.dumps(record)
    assert not [name for name in (str(ROOT), "/tmp/", str(Path.home())) if name in text]


def test_the_committed_page_is_that_of_the_record() -> None:
    from gpu_checking.page import page_of

    file = DOCS / "gpu.json"
    committed = json.loads(file.read_text()) if file.exists() else None
    assert (DOCS / "gpu.md").read_text() == page_of(committed)


def test_without_a_record_every_row_says_so() -> None:
    from gpu_checking.page import page_of
    from gpu_checking.parts import BOUNDS, PARTS

    page = page_of(None)
    assert page.count("| not run |") == len(PARTS) + len(BOUNDS)
    assert "bash scripts/gpu_check.sh" in page


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    from gpu_checking.setting import Setting

    return Setting("cpu", tmp_path, budget_s=60.0)


def test_a_broken_part_is_told_and_the_others_run(setting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_check import check, exit_code
    from gpu_checking.guard import Found, NotApplicable, Part

    def breaks(setting: Any) -> Found:
        raise RuntimeError(f"no kernel in {setting.folder}/x.so")

    def does_not_apply(setting: Any) -> Found:
        raise NotApplicable("one GPU")

    parts = [
        Part("broken", "Broken", "", breaks),
        Part("wrong", "Wrong", "", lambda setting: Found([{"differing": 2}], ["2 codes differ", "and more"])),
        Part("none", "None", "", does_not_apply),
        Part("good", "Good", "", lambda setting: Found([{"differing": 0}])),
    ]
    record = check(setting, parts)
    results = {name: (found["result"], found["message"]) for name, found in record["parts"].items()}
    assert results == {
        "broken": ("failed", "RuntimeError: no kernel in x.so"),
        "wrong": ("failed", "2 codes differ; and more"),
        "none": ("not applicable", "one GPU"),
        "good": ("passed", ""),
    }
    assert record["parts"]["wrong"]["rows"] == [{"differing": 2}]
    assert "Broken: failed RuntimeError" in capsys.readouterr().out
    codes = [exit_code(check(setting, [part])) for part in parts]
    assert codes == [1, 1, 0, 0]
    assert exit_code(record) == 1


def test_an_arm_that_fails_does_not_take_the_others_along(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_checking import costs

    def weigh(work: Any, arms: tuple[str, ...]) -> Any:
        if arms == ("QAT",):
            raise RuntimeError("no memory")
        return {arms[0]: [4.0]}, {arms[0]: [float("inf")]}

    monkeypatch.setitem(setting.__dict__, "work_on", lambda batch_size: None)
    monkeypatch.setattr(costs, "weigh", weigh)
    found = costs.weigh_steps(setting)
    assert found.wrong == ["QAT: RuntimeError: no memory"]
    assert {row["arm"] for row in found.rows} == set(costs.arms_of(setting)) - {"QAT"}


def test_numbers_that_json_has_not(setting: Any) -> None:
    from gpu_check import check
    from gpu_checking.guard import Found, Part

    part = Part("part", "Part", "", lambda setting: Found([{"largest": float("inf"), "share": 0.5}]))
    rows = check(setting, [part])["parts"]["part"]["rows"]
    assert rows == [{"largest": "Infinity", "share": 0.5}]


def test_what_would_begin_too_late_is_skipped(tmp_path: Path) -> None:
    from gpu_check import check, exit_code
    from gpu_checking.guard import Found, Part
    from gpu_checking.setting import Setting

    ran = []
    record = check(
        Setting("cpu", tmp_path, budget_s=0.0),
        [Part("late", "Late", "", lambda setting: ran.append(1) or Found([]))],
    )
    assert (record["parts"]["late"]["result"], record["parts"]["late"]["message"]) == (
        "skipped",
        "out of time",
    )
    assert not ran
    assert exit_code(record) == 0


def test_a_verb_that_fails_says_why(setting: Any) -> None:
    with pytest.raises(RuntimeError, match=r"cpq_train describe ended with code 2: error: .*no\.ckpt"):
        setting.verb("describe", "no.ckpt")


def test_several_ranks_are_timed_against_one(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checking.runs import several_ranks

    asked = []

    def verb(name: str, *arguments: Any) -> float:
        devices = arguments[arguments.index("--trainer.devices") + 1]
        asked.append((name, devices))
        return 30.0 / devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"device": "cuda", "verb": verb, "data": Path("data"), "ptq": Path("ptq")}.items():
        monkeypatch.setitem(setting.__dict__, name, value)
    rows = several_ranks(setting).rows
    assert asked == [(verb, n) for verb in ("calibrate", "validate") for n in (1, 4)]
    assert [row["speed-up"] for row in rows] == [1.0, 4.0, 1.0, 4.0]


def test_synchronisations_are_noted_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_checking import counts

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    told = counts._Told()
    rulebook = f"warnings.warn({counts.SYNCHRONISES!r})"

    def work() -> None:
        with counts._telling(told):
            for _ in range(2):
                warnings.warn(f"{counts.SYNCHRONISES} (Triggered internally)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            exec(compile(rulebook, "/site-packages/spconv/pytorch/ops.py", "exec"), {"warnings": warnings})

    with pytest.warns(UserWarning, match="something else"):
        work()
    assert modes == ["warn", "default"]
    assert told.num_of_rulebooks == 1
    assert list(told.waits.values()) == [2]
    assert "test_gpu_check.py" in next(iter(told.waits))


def test_the_graph_is_held_against_an_eager_step(setting: Any) -> None:
    from gpu_checking import graph
    from steps import computing

    network = setting.work.networks["qat"]
    config = network.config
    shape = (1, network.backbone_2d.blocks[0][1].in_channels, config.geometry.height, config.geometry.width)
    bev = torch.rand(shape).requires_grad_()
    with computing(network):
        gradients = [torch.ones_like(out) for out in graph._outputs(network, bev)]
    first, again = (graph._step(network, bev, gradients) for _ in range(2))
    row = graph._compared("all", first, again)
    assert row["tensors"] == len(gradients) + 1 + len(
        [*network.backbone_2d.parameters(), *network.dense_head.parameters()]
    )
    assert row["differing"] == 0
    assert graph._compared("all", first, [tensor + 1 for tensor in again])["differing"] == row["numbers"]


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "device is cuda, and this machine has none"), ("cpu", "--output FOLDER")]
)
def test_mistakes(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_check import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        main(device)  # type: ignore[arg-type]


def test_the_marker_is_the_only_way_to_need_a_gpu() -> None:
    skips = re.compile(r"skipif\((not torch\.cuda|torch\.cuda\.device_count\(\) <)")
    assert [path.name for path in (ROOT / "tests").rglob("*.py") if skips.search(path.read_text())] == []
