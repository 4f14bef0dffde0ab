"""The rows of deployed runs in a report: what an engine ran, and what that changed."""

import json
from pathlib import Path
from typing import Any

import pytest
from scored_runs import write_arm

from cpq_train.evaluation.metrics_file import read_metrics, write_metrics
from cpq_train.report.compare import compare

ENGINE = {
    "name": "onnxruntime",
    "version": "1.2.3",
    "target": "portable",
    "file": "a.onnx",
    "sha256": "e" * 64,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float run, a qat run, an exact engine of it, and one that is not."""
    root = tmp_path_factory.mktemp("runs")
    for name, arm, noise_m in (("float", "float", 0.3), ("qat", "qat", 0.4)):
        write_arm(root / name, arm, noise_m)
    for name, noise_m in (("exact", 0.4), ("rough", 0.6)):
        write_arm(root / name, "deployed", noise_m)
        _change(root / name, checkpoint={"path": "qat.ckpt", "sha256": "qat"}, engine=ENGINE)
    for name, boxes in (("qat", "1"), ("exact", "1"), ("rough", "2")):
        (root / name / "results_nusc.json").write_text(boxes)
    return {name: root / name for name in ("float", "qat", "exact", "rough")}


def _change(folder: Path, **entries: Any) -> None:
    path = folder / "metrics.json"
    write_metrics(path, {**read_metrics(path), **entries})


def test_an_exact_engine_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    report = compare([folders["exact"], folders["qat"], folders["float"]], tmp_path)
    assert [run["arm"] for run in report["runs"]] == ["float", "qat", "deployed"]
    assert report["runs"][1]["engine"] is None
    engine = report["runs"][-1]["engine"]
    assert engine == {
        **ENGINE,
        "source": "qat",
        "change": {"mAP": 0.0, "NDS": 0.0},
        "the_same_submission": True,
    }
    assert "onnxruntime 1.2.3" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_another_one_shows_what_it_changes(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = compare([folders["qat"], folders["rough"]], tmp_path)["runs"][-1]["engine"]
    scores = [read_metrics(folders[name] / "metrics.json")["metrics"] for name in ("rough", "qat")]
    assert engine["change"] == {name: scores[0][name] - scores[1][name] for name in ("mAP", "NDS")}
    assert engine["change"]["mAP"] < 0
    assert not engine["the_same_submission"]


def test_without_its_source(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = compare([folders["float"], folders["exact"]], tmp_path)["runs"][-1]["engine"]
    assert (engine["source"], engine["the_same_submission"]) == (None, None)
    assert engine["change"] == {"mAP": None, "NDS": None}
