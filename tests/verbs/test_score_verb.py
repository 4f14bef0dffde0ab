"""The verb `score`: any submission as a run folder, with the devkit's numbers."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fails
from nuscenes import NuScenes
from nuscenes.eval.detection.tests import test_evaluate

from cpq_train.common.files import sha256_of
from cpq_train.common.nuscenes import TP_ERRORS
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.devkit import evaluate_with_devkit
from cpq_train.evaluation.metrics_file import METRICS, read_metrics, write_metrics
from cpq_train.verbs.cli import main

PUBLISHED_NDS_OF_MOCK = 0.19449091580477748
"""Of the devkit's own test, `nuscenes.eval.detection.tests.test_evaluate`."""


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = bootstrap.scene_weights
    monkeypatch.setattr(bootstrap, "scene_weights", lambda num_scenes: draw(num_scenes, num_resamples=50))


@pytest.fixture(scope="module")
def real(realdata_dir: Path) -> Path:
    """A real detector's submission of mini_val."""
    return realdata_dir / "eval/results_nusc.json"


@pytest.fixture(scope="module")
def on_mini(realdata_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name the data."""
    cache = tmp_path_factory.mktemp("index")
    return [
        *("--data.root", str(realdata_dir / "nuscenes_mini_val"), "--data.version", "v1.0-mini"),
        *("--data.cache_dir", str(cache)),
    ]


@pytest.fixture(scope="module")
def mock(realdata_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The submission of the devkit's own test, drawn as it draws it."""
    path = tmp_path_factory.mktemp("mock") / "nusc_eval.json"
    kept = random.getstate(), np.random.get_state()
    random.seed(42)
    np.random.seed(42)
    nusc = NuScenes("v1.0-mini", str(realdata_dir / "nuscenes_mini_val"), verbose=False)
    path.write_text(json.dumps(test_evaluate.TestMain._mock_submission(nusc, "mini_val")))
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    return path


def edited(source: Path, path: Path, edit: Callable[[list[dict[str, Any]]], None]) -> Path:
    """A copy of a submission after an edit of its boxes in place."""
    document = json.loads(source.read_text())
    edit([box for boxes in document["results"].values() for box in boxes])
    path.write_text(json.dumps(document))
    return path


def test_a_real_submission_has_its_published_score(
    real: Path, on_mini: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["score", str(real), *on_mini, "--output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert "905 detections in 81 samples, of which 905 count" in said.err
    assert "4,441 annotations, of which 3,393 count" in said.err
    found = read_metrics(tmp_path / "run/metrics.json")
    summary = json.loads((real.parent / "metrics_summary.json").read_text())
    assert found["metrics"]["mAP"] == pytest.approx(summary["mean_ap"], abs=1e-12)
    assert found["metrics"]["NDS"] == pytest.approx(summary["nd_score"], abs=1e-12)
    for name, error in summary["tp_errors"].items():
        assert found["metrics"][f"mA{name[0].upper()}E"] == pytest.approx(error, abs=1e-12)
    assert "submission" in said.out
    assert f"{summary['nd_score']:.4f}" in said.out
    assert f"│ car                  │ {np.mean(list(summary['label_aps']['car'].values())):.4f}" in said.out
    assert found["arm"] == "submission"
    assert found["checkpoint"] == {"path": str(real), "sha256": sha256_of(real)}
    assert found["dataset"]["split"] == "val"
    assert found["postprocessing_sha256"] == "unknown"
    assert (tmp_path / "run/results_nusc.json").read_bytes() == real.read_bytes()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"metrics.json", "results_nusc.json", "matches.npz"}


def test_the_mock_submission_of_the_devkit(
    mock: Path,
    on_mini: list[str],
    realdata_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its velocities are NaN where the annotation's are; such a match counts for no velocity error."""
    assert "NaN" in mock.read_text()
    main(["score", str(mock), *on_mini, "--output", str(tmp_path / "run")])
    assert "have no velocity" in capsys.readouterr().err
    found = read_metrics(tmp_path / "run/metrics.json")
    assert found["metrics"]["NDS"] == pytest.approx(PUBLISHED_NDS_OF_MOCK, abs=1e-9)
    tokens = np.array(list(json.loads(mock.read_text())["results"]))
    devkit = evaluate_with_devkit(realdata_dir / "nuscenes_mini_val", "v1.0-mini", mock, tokens)
    assert found["metrics"]["mAP"] == pytest.approx(devkit.mean_ap, abs=1e-9)
    for error, mean in zip(TP_ERRORS, devkit.mean_errors, strict=True):
        assert found["metrics"][f"m{error}"] == pytest.approx(mean, abs=1e-9)
    for (name, of_class), ap, errors in zip(
        found["per_class"].items(), devkit.ap, devkit.errors, strict=True
    ):
        assert list(of_class["AP"].values())[:4] == pytest.approx(ap, abs=1e-9), name
        ours = [np.nan if of_class[error] is None else of_class[error] for error in TP_ERRORS]
        assert ours == pytest.approx(errors, abs=1e-9, nan_ok=True), name
    main(["compare", str(tmp_path / "run"), "--output", str(tmp_path / "report")])


def _odd(boxes: list[dict[str, Any]]) -> None:
    """All that the devkit takes and a network does not write."""
    generator = np.random.default_rng(0)
    for number, box in enumerate(boxes):
        box["detection_score"] = float(80 * box["detection_score"])
        box["num_pts"] = int(number % 9) - 1
        box["further"] = [number]
        if number % 5 == 0:
            box["velocity"] = [float("nan"), 0.0]
        if number % 7 == 0:
            box["translation"] = [round(value) for value in box["translation"]]
        if number % 11 == 0:
            box["detection_score"] = int(box["detection_score"])
        if number % 13 == 0:
            box["rotation"] = (3 * generator.normal(size=4)).tolist()
        if number % 17 == 0:
            box["size"], box["detection_name"] = [0, 0, 0], "trailer"  # of which it finds none
            del box["detection_score"]


@pytest.mark.parametrize("engine", ["vectorised", "devkit"])
def test_what_other_detectors_write_scores_as_in_the_devkit(
    engine: str, real: Path, on_mini: list[str], realdata_dir: Path, tmp_path: Path
) -> None:
    odd = edited(real, tmp_path / "odd.json", _odd)
    main(["score", str(odd), *on_mini, "--output", str(tmp_path / "run"), "--engine", engine])
    found = read_metrics(tmp_path / "run/metrics.json")
    tokens = np.array(list(json.loads(odd.read_text())["results"]))
    devkit = evaluate_with_devkit(realdata_dir / "nuscenes_mini_val", "v1.0-mini", odd, tokens)
    assert devkit.mean_ap > 0.01
    assert found["metrics"]["mAP"] == pytest.approx(devkit.mean_ap, abs=1e-9)
    assert found["metrics"]["NDS"] == pytest.approx(devkit.nds, abs=1e-9)
    assert found["metrics"]["mAVE"] == pytest.approx(devkit.mean_errors[3], abs=1e-9)


def test_it_stands_for_an_arm_and_beside_one(real: Path, on_mini: list[str], tmp_path: Path) -> None:
    """A float arm of which another detector loses every third box; neither kept a sample for a picture."""

    def lose(boxes: list[dict[str, Any]]) -> None:
        for box in boxes[::3]:
            box["translation"][0] += 3.0

    worse = edited(real, tmp_path / "worse.json", lose)
    main(["score", str(real), *on_mini, "--output", str(tmp_path / "float"), "--arm", "float"])
    main(["score", str(worse), *on_mini, "--output", str(tmp_path / "worse")])
    main(["compare", str(tmp_path / "worse"), str(tmp_path / "float"), "--output", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [run["arm"] for run in report["runs"]] == ["float", "submission"]
    assert report["postprocessing_sha256"] == "unknown"
    gap = report["runs"][1]["gap_to_float"]["mAP"]
    assert gap["interval"][0] < gap["value"] < gap["interval"][1] < 0
    assert report["runs"][1]["lost_objects"]["all"]["all"]["lost"] > 50
    assert (tmp_path / "report/lost_objects.csv").read_text().count("\nworse,lost,") > 50
    sections = {picture["section"] for picture in report["pictures"]}
    assert sections == {"scores", "classes", "range", "confidence"}
    text = (tmp_path / "report/report.md").read_text()
    assert "post-processing for all arms but float, submission (worse), of which it is unknown" in text


def test_scores_that_are_no_chances_compare(real: Path, on_mini: list[str], tmp_path: Path) -> None:
    """Matches and errors as ever; how far a percentage is a chance is no question."""

    def in_percent(boxes: list[dict[str, Any]]) -> None:
        for box in boxes:
            box["detection_score"] = float(100 * box["detection_score"])

    percent = edited(real, tmp_path / "percent.json", in_percent)
    main(["score", str(real), *on_mini, "--output", str(tmp_path / "float"), "--arm", "float"])
    main(["score", str(percent), *on_mini, "--output", str(tmp_path / "percent")])
    main(["compare", *map(str, (tmp_path / "float", tmp_path / "percent")), "--output", str(tmp_path / "r")])
    of_float, of_percent = json.loads((tmp_path / "r/report.json").read_text())["runs"]
    assert of_float["reliability"] is not None
    assert of_percent["reliability"] is None
    assert of_percent["gap_to_float"]["mAP"]["value"] == pytest.approx(0, abs=1e-12)
    total = of_percent["lost_objects"]["all"]["all"]
    assert total["won"] == 0 < total["found_by_float"]


def test_what_is_known_of_post_processing_must_agree(
    real: Path, on_mini: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submission is compared with any run, and makes no two others comparable."""
    main(["score", str(real), *on_mini, "--output", str(tmp_path / "submission")])
    for name in ("float", "qat"):
        shutil.copytree(tmp_path / "submission", tmp_path / name)
        document = read_metrics(tmp_path / name / "metrics.json")
        write_metrics(
            tmp_path / name / "metrics.json", {**document, "arm": name, "postprocessing_sha256": name}
        )
    folders = {name: str(tmp_path / name) for name in ("submission", "float", "qat")}
    output = ["--output", str(tmp_path / "report")]
    main(["compare", folders["submission"], folders["float"], *output])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["postprocessing_sha256"] == "float"
    assert "submission: its post-processing is unknown" in capsys.readouterr().out
    error = fails(["compare", *folders.values(), *output], capsys)
    assert "postprocessing_sha256 is 'float' and 'qat'" in error


def _first(key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda boxes: boxes[0].update({key: value})


def _to_logits(boxes: list[dict[str, Any]]) -> None:
    for box in boxes:
        box["detection_score"] = float(20 * box["detection_score"] - 30)


def test_scores_below_0_are_refused_where_the_devkit_refuses_them(
    real: Path, realdata_dir: Path, tmp_path: Path
) -> None:
    """Its curve of scores ends at 0, and may not rise."""
    logits = edited(real, tmp_path / "logits.json", _to_logits)
    tokens = np.array(list(json.loads(real.read_text())["results"]))
    with pytest.raises(AssertionError):
        evaluate_with_devkit(realdata_dir / "nuscenes_mini_val", "v1.0-mini", logits, tokens)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            _first("size", [0.0, 1.0, 1.0]),
            "size of a detection that matches an annotation is [0.0, 1.0, 1.0]",
        ),
        (_first("velocity", [float("inf"), 0.0]), "accepted: finite numbers, or NaN"),
        (_first("detection_name", "tram"), "detection_name 'tram' is unknown"),
        (_to_logits, "scores of class car go down to -"),
    ],
)
def test_a_bad_submission_leaves_nothing(
    edit: Callable[[list[dict[str, Any]]], None],
    says: str,
    real: Path,
    on_mini: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = edited(real, tmp_path / "bad.json", edit)
    error = fails(["score", str(bad), *on_mini, "--output", str(tmp_path / "run")], capsys)
    assert says in error
    assert str(bad) in error
    assert not (tmp_path / "run").exists()


def test_what_does_not_belong_together_is_refused(
    real: Path, on_mini: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["score", str(real), "--output", str(tmp_path / "run")]
    assert "required: data.root" in fails(run, capsys)
    assert "data root 'nowhere' is no folder" in fails([*run, "--data.root", "nowhere"], capsys)
    assert "split 'train' holds no scene" in fails([*run, *on_mini, "--data.val_split", "train"], capsys)
    absent = fails(["score", "none.json", *on_mini, "--output", str(tmp_path / "run")], capsys)
    assert "submission 'none.json' does not exist" in absent
    (tmp_path / "file").touch()
    assert "is no folder" in fails([*run[:2], *on_mini, "--output", str(tmp_path / "file/run")], capsys)


def test_scores_in_place(real: Path, on_mini: list[str], tmp_path: Path) -> None:
    """A submission that lies where the run folder is to be stays as it is."""
    shutil.copy(real, tmp_path / "results_nusc.json")
    main(["score", str(tmp_path / "results_nusc.json"), *on_mini, "--output", str(tmp_path)])
    assert (tmp_path / "results_nusc.json").read_bytes() == real.read_bytes()
    assert set(METRICS) <= read_metrics(tmp_path / "metrics.json")["metrics"].keys()


def test_needs_no_torch(real: Path, on_mini: list[str], tmp_path: Path) -> None:
    """Not even to its end."""
    verbs = [
        ["score", str(real), *on_mini, "--output", str(tmp_path / "run")],
        ["compare", str(tmp_path / "run"), "--output", str(tmp_path / "report")],
    ]
    code = (
        f"import sys\nfrom cpq_train.verbs.cli import main\nfor verb in {verbs!r}: main(verb)\n"
        "sys.exit(len({'torch', 'lightning'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
