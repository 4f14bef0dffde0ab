"""`compare --fail_if`: what is read, which scores are looked at, and the exit code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import fails
from scored_runs import write_arm

from cpq_train.common.errors import UserError
from cpq_train.common.nuscenes import DETECTION_CLASSES
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.report.checks import Expression, read_expression
from cpq_train.report.compare import compare
from cpq_train.verbs.cli import main

NOISE_M = {"float": 0.3, "ptq": 0.8, "qat": 0.4}


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    draw = bootstrap.scene_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "scene_weights", lambda num_scenes: draw(num_scenes, num_resamples=20))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for arm, noise_m in NOISE_M.items():
        write_arm(root / arm, arm, noise_m)
    return {arm: root / arm for arm in NOISE_M}


@pytest.fixture(scope="module")
def scores(runs: dict[str, Path]) -> dict[str, Any]:
    return {arm: read_metrics(folder / "metrics.json") for arm, folder in runs.items()}


def compared(runs: dict[str, Path], output: Path, *expressions: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the checks of `report.json`."""
    code: Any = 0
    try:
        main(["compare", *map(str, runs.values()), "--output", str(output), "--fail_if", *expressions])
    except SystemExit as exit_:
        code = exit_.code
    return code, json.loads((output / "report.json").read_text())["checks"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mAP<float-0.01", (None, "mAP", None, "<", "float", -0.01)),
        ("  mAP < float - .01 ", (None, "mAP", None, "<", "float", -0.01)),
        ("qat.NDS<float", ("qat", "NDS", None, "<", "float", 0)),
        ("qat . NDS > ptq + 1e-2", ("qat", "NDS", None, ">", "ptq", 0.01)),
        ("mAVE>0.4", (None, "mAVE", None, ">", None, 0.4)),
        ("mAP<-1", (None, "mAP", None, "<", None, -1.0)),
        ("AP:car<float-0.02", (None, "AP", "car", "<", "float", -0.02)),
        ("AP : * < float-0.05", (None, "AP", "*", "<", "float", -0.05)),
        ("float_tuned.AOE:traffic cone>2", ("float_tuned", "AOE", "traffic cone", ">", None, 2.0)),
        ("deployed.ATE:construction_vehicle>qat", ("deployed", "ATE", "construction_vehicle", ">", "qat", 0)),
    ],
)
def test_expressions_are_read(text: str, expected: tuple[Any, ...]) -> None:
    row, metric, of_class, sign, against, number = expected
    assert read_expression(text) == Expression(text, row, metric, of_class, sign, against, number)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not readable; accepted: [ROW.]METRIC[:CLASS], < or >"),
        ("mAP", "is not readable"),
        ("mAP<", "is not readable"),
        ("mAP<=0.5", "is not readable"),
        ("0.5<mAP", "is not readable"),
        ("mAP<float-", "is not readable"),
        ("mAP<float*0.9", "is not readable"),
        ("mAP<0.5-float", "is not readable"),
        ("mAP<nan", "names row 'nan'; accepted: float, float_tuned, ptq, qat, deployed, submission"),
        ("mAP<0.5 and NDS<0.5", "is not readable"),
        ("mAP<1e999", "is not readable"),
        ("int8.mAP<0.5", "names row 'int8'; accepted: float, float_tuned"),
        ("mAP<flaot-0.01", "names row 'flaot'; accepted: float, float_tuned"),
        ("map<0.5", "names metric 'map'; accepted: mAP, NDS, mATE"),
        ("AP<0.5", "names metric 'AP'; accepted: mAP, NDS, mATE"),
        ("mAP:car<0.5", "names metric 'mAP:car'; accepted: mAP, NDS, mATE"),
        ("float.mAP<float-0.01", "measures float against itself; accepted: two rows"),
        ("ptq.mAP<float_tuned", "ptq: no float_tuned run among those compared"),
        ("deployed.mAP<0.5", "names no run: deployed is not among float, ptq, qat"),
        ("AP:tram<float", "there is no class 'tram'; accepted: car, truck"),
        ("AVE:barrier>0.3", "there is no AVE of 'barrier'; accepted: car, truck"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_any_work(
    text: str, says: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report"
    arguments = ["compare", *map(str, runs.values()), "--output", str(output)]
    error = fails([*arguments, "--fail_if", "mAP<0", text], capsys)
    assert f"fail_if {text!r}" in error
    assert says in error
    assert not output.exists()


def test_a_loss_beyond_the_bound_ends_with_1(
    runs: dict[str, Path], scores: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every run but float's own is looked at, and all of the report is there."""
    of_arm = {arm: found["metrics"]["mAP"] for arm, found in scores.items()}
    between = (of_arm["float"] - of_arm["ptq"] + of_arm["float"] - of_arm["qat"]) / 2
    code, checks = compared(runs, tmp_path, f"mAP<float-{between}")
    assert code == 1
    assert [(one["run"], one["failed"]) for one in checks] == [("ptq", True), ("qat", False)]
    assert checks[0] == {
        "expression": f"mAP<float-{between}",
        "run": "ptq",
        "metric": "mAP",
        "class": None,
        "value": of_arm["ptq"],
        "sign": "<",
        "bound": of_arm["float"] - between,
        "against": "float",
        "failed": True,
    }
    said = capsys.readouterr()
    assert said.err == "1 of 2 checks failed\n"
    row = next(line for line in said.out.splitlines() if "FAILED" in line)
    assert f"{of_arm['ptq']:.4f} │ not below {of_arm['float'] - between:.4f} │ FAILED" in row
    assert said.out.count("passed") == 1
    assert {"report.html", "report.md", "report.json", "lost_objects.csv"} <= {
        f.name for f in tmp_path.iterdir()
    }
    for name in ("report.html", "report.md"):
        assert "FAILED" in (tmp_path / name).read_text()


def test_what_holds_ends_with_0(
    runs: dict[str, Path], scores: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    highest = max(found["metrics"]["mATE"] for found in scores.values())
    code, checks = compared(runs, tmp_path, "qat.NDS<ptq", f"mATE>{highest}", "mAP<ptq-0.5")
    assert code == 0
    assert not any(one["failed"] for one in checks)
    assert [one["run"] for one in checks] == ["qat", "float", "ptq", "qat", "float", "qat"]
    assert "FAILED" not in capsys.readouterr().out


def test_every_class_is_checked_that_has_the_score(
    runs: dict[str, Path], scores: dict[str, Any], tmp_path: Path
) -> None:
    code, checks = compared(runs, tmp_path, "ptq.AP:*<float-0.05", "qat.AVE:*>0.0")
    of_ap = [one for one in checks if one["metric"] == "AP"]
    assert [one["class"] for one in of_ap] == list(DETECTION_CLASSES)
    for one in of_ap:
        ptq, of_float = (scores[arm]["per_class"][one["class"]]["AP"]["mean"] for arm in ("ptq", "float"))
        assert one["failed"] == (ptq < of_float - 0.05)
    assert code == int(any(one["failed"] for one in checks)) == 1
    no_velocity = {"barrier", "traffic_cone"}
    assert {one["class"] for one in checks if one["metric"] == "AVE"} == set(DETECTION_CLASSES) - no_velocity


def test_the_bound_of_a_run_is_its_parents(tmp_path: Path, runs: dict[str, Path]) -> None:
    """Of two float runs that of the arm's own; without a parent among several there is none to take."""
    write_arm(tmp_path / "better", "float", 0.1)
    write_arm(tmp_path / "qat", "qat", 0.4, {"float": "better"})
    folders = {"float": runs["float"], "better": tmp_path / "better", "qat": tmp_path / "qat"}
    _, (one,) = compared(folders, tmp_path / "report", "mAP<float-0.9")
    assert one["against"] == "float (better)"
    with pytest.raises(UserError, match="2 float runs, and none or several of them are the parent of ptq"):
        compare([*folders.values(), runs["ptq"]], tmp_path / "report", fail_if=["mAP<float"])


def test_repeated_options_add_up(runs: dict[str, Path], tmp_path: Path) -> None:
    code, checks = compared(runs, tmp_path, "mAP<1", "--fail_if", "NDS<0")
    assert code == 1
    assert [one["metric"] for one in checks] == ["mAP"] * 3 + ["NDS"] * 3


def test_without_checks_nothing_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    main(["compare", *map(str, runs.values()), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "report.json").read_text())["checks"] == []
    assert "Checks" not in (tmp_path / "report.md").read_text()
