"""The comparison of arms: its numbers, its files, and what it refuses to compare."""

import base64
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import wandb
from evaluation_problems import random_boxes, random_problem
from scored_runs import write_arm, write_own_arm

from cpq_train.common.detection_task import NUSCENES
from cpq_train.common.errors import UserError
from cpq_train.evaluation import bootstrap
from cpq_train.evaluation.gaps import share_won_back
from cpq_train.evaluation.matches import write_matches
from cpq_train.evaluation.metrics_file import read_metrics, write_metrics
from cpq_train.profiling.latency_file import read_latency, write_latency
from cpq_train.report.bev import BEV_FILE, BevSample, read_bev_sample, write_bev_sample
from cpq_train.report.compare import compare
from cpq_train.report.plots import DETECTION_COLOUR

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""One pixel."""
NOISE_M = {"float": 0.3, "float_tuned": 0.28, "ptq": 0.8, "qat": 0.4}


def write_bev(folder: Path) -> None:
    samples = random_problem(0, 1, 0)[0].samples
    boxes = random_boxes(8, samples, np.arange(10), np.random.default_rng(0))
    lidar = np.column_stack([boxes.translation, boxes.size, boxes.yaw, np.zeros((8, 2))])
    points = np.random.default_rng(0).uniform(-50, 50, (2000, 3))
    sample = BevSample(
        "token", points, lidar, boxes.label, lidar + 0.5, np.linspace(0.1, 0.9, 8), boxes.label
    )
    write_bev_sample(folder / BEV_FILE, sample)


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    draw = bootstrap.scene_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "scene_weights", lambda num_scenes: draw(num_scenes, num_resamples=100))
        yield


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for arm, noise_m in NOISE_M.items():
        write_arm(root / arm, arm, noise_m)
        write_bev(root / arm)
    return {arm: root / arm for arm in NOISE_M}


def test_report(arms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = compare([arms["qat"], arms["ptq"], arms["float_tuned"], arms["float"]], tmp_path / "report")
    assert json.loads((tmp_path / "report/report.json").read_text()) == report
    runs = {run["arm"]: run for run in report["runs"]}
    assert list(runs) == ["float", "float_tuned", "ptq", "qat"]
    scores = {arm: read_metrics(folder / "metrics.json")["metrics"] for arm, folder in arms.items()}
    for metric in ("mAP", "NDS"):
        gap = runs["ptq"]["gap_to_float"][metric]
        assert gap["value"] == scores["ptq"][metric] - scores["float"][metric] < 0
        assert gap["interval"][0] < gap["value"] < gap["interval"][1] < 0
        share = (scores["qat"][metric] - scores["ptq"][metric]) / (
            scores["float"][metric] - scores["ptq"][metric]
        )
        assert runs["qat"]["ptq_loss_won_back"][metric] == {"value": share, "reason": None}
        assert 0.5 < share < 1
        assert runs["float_tuned"]["ptq_loss_won_back"][metric]["value"] is None
        assert runs["float"]["gap_to_float"][metric]["value"] is None
    text, console = (tmp_path / "report/report.md").read_text(), capsys.readouterr().out
    for line in (f"| float | {scores['float']['mAP']:.4f} [", "| qat | 20/21 | 85/85 |", "| pedestrian |"):
        assert line in text
    for arm in NOISE_M:
        assert f"{scores[arm]['NDS']:.4f}" in text
        assert f"{scores[arm]['NDS']:.4f}" in console
    sections = {picture["section"] for picture in report["pictures"]}
    assert sections == {"scores", "bev", "classes", "range", "confidence"}
    for picture in report["pictures"]:
        assert (tmp_path / "report" / picture["file"]).stat().st_size > 0
        assert f"]({picture['file']})" in text
    assert png_size(tmp_path / "report/pictures/bev_token.png") == (1600, 1600)


@pytest.mark.parametrize("token", ["../../escaped", "/escaped", "a" * 300])
def test_a_sample_token_names_no_other_place(tmp_path: Path, token: str) -> None:
    runs = tmp_path / "runs"
    write_arm(runs / "float", "float", 0.3)
    write_bev(runs / "float")
    bev = runs / "float" / BEV_FILE
    write_bev_sample(bev, replace(read_bev_sample(bev), token=token))
    report = compare([runs / "float"], tmp_path / "out/report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report"]
    (file,) = (picture["file"] for picture in report["pictures"] if picture["section"] == "bev")
    assert min(png_size(tmp_path / "out/report" / file)) > 0
    assert (tmp_path / "out/report" / file).parent == tmp_path / "out/report/pictures"


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_runs_that_find_nothing(tmp_path: Path) -> None:
    """All scores are 0, and all intervals have no width."""
    for arm in ("float", "ptq", "qat"):
        write_arm(tmp_path / arm, arm, noise_m=100.0)
    report = compare([tmp_path / arm for arm in ("float", "ptq", "qat")], tmp_path / "report")
    assert all(run["metrics"]["mAP"] == 0 for run in report["runs"])
    assert (tmp_path / "report/report.html").exists()
    total = report["runs"][1]["lost_objects"]["all"]["all"]
    assert total["objects"] > 0
    assert total["found_by_float"] == total["lost"] == total["won"] == 0


def test_lost_objects_are_counted_and_listed_alike(arms: dict[str, Path], tmp_path: Path) -> None:
    runs = {run["arm"]: run for run in compare(list(arms.values()), tmp_path)["runs"]}
    assert runs["float"]["lost_objects"] is None
    with (tmp_path / "lost_objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for arm in ("float_tuned", "ptq", "qat"):
        (total,) = runs[arm]["lost_objects"]["all"].values()
        for change in ("lost", "won"):
            listed = [row for row in rows if (row["run"], row["change"]) == (arm, change)]
            assert len(listed) == total[change]
            groups = runs[arm]["lost_objects"]
            for group in ("class", "range_m", "num_points"):
                assert sum(cell[change] for cell in groups[group].values()) == total[change]
    assert runs["ptq"]["lost_objects"]["all"]["all"]["lost"] > 0


def test_lost_objects_are_drawn_from_near_by(arms: dict[str, Path], tmp_path: Path) -> None:
    """All objects of a sample, and close-ups of those that ptq loses; float's own picture has none."""
    for arm in ("float", "ptq"):
        shutil.copytree(arms[arm], tmp_path / arm)
    compare([tmp_path / "float", tmp_path / "ptq"], tmp_path / "report")
    with (tmp_path / "report/lost_objects.csv").open(newline="") as file:
        lost = [row for row in csv.DictReader(file) if row["change"] == "lost"]
    of_sample = [row for row in lost if row["sample_token"] == lost[0]["sample_token"]][:3]
    tokens = np.array(["elsewhere", *(row["annotation_token"] for row in of_sample)])
    for arm in ("float", "ptq"):
        sample = read_bev_sample(tmp_path / arm / BEV_FILE)
        few = {"gt_boxes": sample.gt_boxes[: len(tokens)], "gt_labels": sample.gt_labels[: len(tokens)]}
        write_bev_sample(tmp_path / arm / BEV_FILE, replace(sample, gt_tokens=tokens, **few))
    report = compare([tmp_path / "float", tmp_path / "ptq"], tmp_path / "report")
    files = [picture["file"] for picture in report["pictures"] if picture["section"] == "bev"]
    assert files == ["pictures/bev_token.png", "pictures/ptq_lost.png"]
    assert png_size(tmp_path / "report" / files[1]) == (400 * len(of_sample), 840)


def test_without_a_float_run_nothing_is_lost(arms: dict[str, Path], tmp_path: Path) -> None:
    report = compare([arms["ptq"], arms["qat"]], tmp_path)
    assert not (tmp_path / "lost_objects.csv").exists()
    assert "Objects lost" not in (tmp_path / "report.html").read_text()
    assert all(run["lost_objects"] is None for run in report["runs"])


def test_measurements_of_the_profile_are_shown(arms: dict[str, Path], tmp_path: Path) -> None:
    document = read_metrics(arms["qat"] / "metrics.json")
    document["profile"] = {
        "stored_bytes": 5 * 2**18,
        "latency_ms": 12.345,
        "num_macs": 1_234_567,
        "device": "cpu",
        "layers": {"conv": 3},
    }
    (tmp_path / "profiled").mkdir()
    write_metrics(tmp_path / "profiled/metrics.json", document)
    compare([arms["float"], tmp_path / "profiled"], tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "### Size and memory" in text
    assert "| arm | stored MiB | num macs |\n" in text
    assert "| qat (profiled) | 1.25 | 1,234,567 |" in text
    assert "| float | n/a | n/a |" in text


def test_times_of_separate_measurements_are_not_compared(arms: dict[str, Path], tmp_path: Path) -> None:
    """They stay in the run's own file."""
    for arm in ("float", "qat"):
        shutil.copytree(arms[arm], tmp_path / arm)
        document = read_metrics(arms[arm] / "metrics.json")
        document["profile"] = {"stored_bytes": 2**20, "latency_ms": 12.345}
        write_metrics(tmp_path / arm / "metrics.json", document)
    report = compare([tmp_path / "float", tmp_path / "qat"], tmp_path / "report")
    assert "atency" not in (tmp_path / "report/report.md").read_text()
    assert "12.3" not in (tmp_path / "report/report.md").read_text()
    assert report["latency"] is None
    assert [run["latency"] for run in report["runs"]] == [None, None]


def row(name: str, sha256: str, runs_as: str, ms: float, **summary: Any) -> dict[str, Any]:
    return {
        "name": name,
        "arm": name,
        "file": f"{name}.file",
        "sha256": sha256,
        "runs_as": runs_as,
        **{"ms": ms, "min_ms": ms - 1, "max_ms": ms + 2, "cpu_ms": 2 * ms},
        "summary": summary,
    }


def write_times(path: Path, *rows: dict[str, Any]) -> Path:
    measured_on = {"input": "first", "device": "cpu", "torch": "2.13.0"}
    numbers = {"num_points": 90, "num_voxels": 5000, "num_threads": 1, "num_passes": 5}
    write_latency(path, {**measured_on, **numbers, "rows": list(rows)})
    return path


FAKE = "PyTorch, fake quantization"


def test_times_measured_in_turn(
    arms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine is known by its own hash, not by that of the checkpoint that it was made of."""
    engine = tmp_path / "engine"
    shutil.copytree(arms["qat"], engine)
    document = read_metrics(engine / "metrics.json")
    by = {"name": "onnxruntime", "version": "1.32.0", "file": "qat.onnx", "sha256": "of the engine"}
    write_metrics(engine / "metrics.json", {**document, "engine": by})
    times = write_times(
        tmp_path / "latency.json",
        row("float", "float", "PyTorch, float", 100.0, num_macs=7, training_peak_bytes=2**21),
        row("qat", "qat", FAKE, 150.0, num_macs=7, training_peak_bytes=2**20),
        row("deployed", "of the engine", "engine, onnxruntime 1.32.0", 40.0, engine_file_bytes=2**19),
        row("ptq", "another ptq", FAKE, 151.0),
    )
    folders = [arms["float"], arms["float_tuned"], arms["qat"], engine]
    report = compare(folders, tmp_path / "report", latency=times)
    text = (tmp_path / "report/report.md").read_text()
    table = text[text.index("### Latency of one pass, measured in turn in one process") :]
    for line in (
        "| arm | runs as | median ms | least-greatest ms | CPU ms | ratio to float |",
        "| float | PyTorch, float | 100.00 | 99.00-102.00 | 200.00 | 1.00 |",
        "| qat | PyTorch, fake quantization | 150.00 | 149.00-152.00 | 300.00 | 1.50 |",
        "| qat (engine) | engine, onnxruntime 1.32.0 | 40.00 | 39.00-42.00 | 80.00 | 0.40 |",
        "only rows that run as an engine are deployment figures",
        "medians of 5 passes from voxels to boxes, 5,000 voxels of the cloud first, on cpu, threads: 1",
        "- Without a measured latency: float_tuned.",
        "- Measured, but of no run that is compared: ptq (ptq.file).",
    ):
        assert line.lower() in table.lower()
    for line in (
        "| arm | engine file MiB | num macs | training peak MiB |",
        "| float | n/a | 7 | 2.00 |",
        "| float_tuned | n/a | n/a | n/a |",
        "| qat (engine) | 0.50 | n/a | n/a |",
    ):
        assert line in text
    out = capsys.readouterr().out
    assert "Only rows that run as an engine are deployment figures." in " ".join(out.split())
    assert "onnxruntime 1.32.0" in (tmp_path / "report/report.html").read_text()
    assert report["latency"] == read_latency(times)
    assert json.loads((tmp_path / "report/report.json").read_text()) == report
    assert report["runs"][2]["latency"]["ratio_to_float"] == 1.5
    assert report["runs"][1]["latency"] is None


def test_times_without_those_of_float(arms: dict[str, Path], tmp_path: Path) -> None:
    times = write_times(tmp_path / "latency.json", row("qat", "qat", FAKE, 150.0))
    compare([arms["float"], arms["qat"]], tmp_path / "report", latency=times)
    text = (tmp_path / "report/report.md").read_text()
    assert "| qat | PyTorch, fake quantization | 150.00 | 149.00-152.00 | 300.00 | n/a |" in text
    assert "- Without a measured latency: float." in text


def test_times_of_none_of_the_runs(arms: dict[str, Path], tmp_path: Path) -> None:
    """No table, but the section says why."""
    times = write_times(tmp_path / "latency.json", row("qat", "another", FAKE, 150.0))
    compare([arms["float"], arms["qat"]], tmp_path / "report", latency=times)
    text = (tmp_path / "report/report.md").read_text()
    assert "measured in turn" not in text
    assert "deployment" not in text
    assert "- Without a measured latency: float, qat." in text


def test_refuses_what_is_no_latency_file(arms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text("{}")
    for file, message in (("latency.json", "schema is None; accepted: 1"), ("absent.json", "does not exist")):
        with pytest.raises(UserError, match=message):
            compare([arms["float"]], tmp_path / "report", latency=tmp_path / file)
    assert not (tmp_path / "report").exists()


DRIFT = "step,quantizer,amax,start_amax,clipped_share,sqnr_db\n"


def test_what_tuning_left_behind_is_drawn(arms: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "tuned"
    shutil.copytree(arms["qat"], run)
    (run / "amax_drift.csv").write_text(
        f"{DRIFT}0,conv._input_quantizer,2,2,0.1,30\n5,conv._input_quantizer,4,2,,\n"
    )
    (run / "sensitivity.png").write_bytes(PNG)
    report = compare([arms["float"], run], tmp_path / "report")
    files = [picture["file"] for picture in report["pictures"] if picture["section"] == "quantizers"]
    assert files == ["pictures/tuned_amax_drift.svg", "pictures/tuned_sensitivity.png"]
    svg = (tmp_path / "report" / files[0]).read_text()
    assert "conv._input_quantizer, 5: +1<" in svg
    assert "conv._input_quantizer, 0: +0<" in svg
    assert (tmp_path / "report" / files[1]).read_bytes() == PNG
    text = (tmp_path / "report/report.md").read_text()
    assert "| `conv._input_quantizer` | 2.000 | n/a | n/a |" in text


def test_pictures_of_runs_with_one_name(arms: dict[str, Path], tmp_path: Path) -> None:
    for experiment, content in (("first", PNG), ("second", PNG + b"other")):
        shutil.copytree(arms["qat"], tmp_path / experiment / "qat")
        (tmp_path / experiment / "qat/sensitivity.png").write_bytes(content)
    report = compare([tmp_path / "first/qat", tmp_path / "second/qat"], tmp_path / "report")
    files = [picture["file"] for picture in report["pictures"] if picture["section"] == "quantizers"]
    assert [(tmp_path / "report" / file).read_bytes() for file in files] == [PNG, PNG + b"other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("step,amax\n1,2\n", "columns .*'quantizer'.* are missing"), (f"{DRIFT}1,conv,wide,2,,\n", "line 2")],
)
def test_bad_drift_files(arms: dict[str, Path], tmp_path: Path, text: str, message: str) -> None:
    run = tmp_path / "tuned"
    shutil.copytree(arms["qat"], run)
    (run / "amax_drift.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        compare([arms["float"], run], tmp_path / "report")


def test_the_report_goes_to_wandb(
    arms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    compare([arms["float"], arms["qat"]], tmp_path / "report", wandb="experiments")
    wandb.teardown()  # its service writes the file, and has written it all when it has ended
    (run,) = tmp_path.rglob("run-*.wandb")
    logged = _without_block_headers(run.read_bytes())
    group = arms["qat"].parent.name
    for text in (b"experiments", f"{group}-compare".encode(), f"{group}-report".encode(), b"scores/Scores"):
        assert text in logged
    tables = [path.name for path in run.parent.rglob("*.table.json")]
    assert any(name.startswith("Against float") for name in tables)
    (page,) = run.parent.rglob("*.html")
    assert page.read_bytes() == (tmp_path / "report/report.html").read_bytes()


def _without_block_headers(log: bytes) -> bytes:
    """A W&B file's records joined: LevelDB's log format cuts them at blocks of 32 KiB."""
    pieces, at = [], 7
    while at < len(log):
        if 32_768 - at % 32_768 < 7:  # too little left for a header
            at += 32_768 - at % 32_768
        length = int.from_bytes(log[at + 4 : at + 6], "little")
        pieces.append(log[at + 7 : at + 7 + length])
        at += 7 + length
    return b"".join(pieces)


def test_differences_are_paired(arms: dict[str, Path], tmp_path: Path) -> None:
    """Two arms that differ little: their own intervals overlap widely, that of the difference is narrow."""
    write_arm(tmp_path / "close", "qat", NOISE_M["float"] + 0.02)
    report = compare([arms["float"], tmp_path / "close"], tmp_path / "report")
    gap = report["runs"][1]["gap_to_float"]["mAP"]["interval"]
    own = report["runs"][1]["confidence"]["mAP"]
    assert gap[1] - gap[0] < (own[1] - own[0]) / 2


def test_scenes_in_another_order_are_paired_all_the_same(arms: dict[str, Path], tmp_path: Path) -> None:
    found = write_arm(tmp_path / "reordered", "qat", NOISE_M["qat"]).matches
    order = np.arange(len(found.scene_name))[::-1]
    reordered = found.__class__(
        **{name: getattr(found, name) for name in found.__dataclass_fields__}
        | {"scene_name": found.scene_name[order], "sample_scene": order[found.sample_scene]}
    )
    write_matches(tmp_path / "reordered/matches.npz", reordered)
    one = compare([arms["float"], arms["qat"]], tmp_path / "one")["runs"][1]
    other = compare([arms["float"], tmp_path / "reordered"], tmp_path / "other")["runs"][1]
    for metric in ("mAP", "NDS"):
        intervals = [run["gap_to_float"][metric]["interval"] for run in (one, other)]
        np.testing.assert_allclose(*intervals, rtol=0, atol=1e-12)


def test_no_share_where_ptq_lost_nothing(arms: dict[str, Path], tmp_path: Path) -> None:
    write_arm(tmp_path / "ptq", "ptq", 0.2)
    shares = compare([arms["float"], tmp_path / "ptq", arms["qat"]], tmp_path)["runs"][2]["ptq_loss_won_back"]
    assert shares["mAP"]["value"] is None
    assert "PTQ lost no mAP" in shares["mAP"]["reason"]
    assert "qat, PTQ loss in mAP won back: PTQ lost no mAP" in (tmp_path / "report.md").read_text()


def test_no_share_where_the_loss_may_be_chance(
    arms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "interval", lambda distribution: (-1.0, 1.0))
    run = compare([arms["float"], arms["ptq"], arms["qat"]], tmp_path)["runs"][2]
    assert run["ptq_loss_won_back"]["mAP"]["value"] is None
    assert "95% interval [-1.0000, 1.0000] with 0 inside" in run["ptq_loss_won_back"]["mAP"]["reason"]


def test_without_matches_there_is_a_share_but_no_interval(arms: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for arm in ("float", "ptq", "qat"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "metrics.json").write_bytes((arms[arm] / "metrics.json").read_bytes())
        folders.append(tmp_path / arm)
    qat = compare(folders, tmp_path / "report")["runs"][2]
    assert qat["ptq_loss_won_back"]["mAP"]["value"] is not None
    assert "no interval" in qat["ptq_loss_won_back"]["mAP"]["reason"]
    assert qat["gap_to_float"]["mAP"]["interval"] is None


def test_parents_decide_between_several_baselines(arms: dict[str, Path], tmp_path: Path) -> None:
    write_arm(tmp_path / "other_float", "float", 0.5)
    write_arm(tmp_path / "child", "qat", 0.4, parents={"float": "other_float"})
    runs = compare([arms["float"], tmp_path / "other_float", tmp_path / "child", arms["qat"]], tmp_path)[
        "runs"
    ]
    child, orphan = runs[2], runs[3]
    other = next(run for run in runs if run["name"] == "other_float")
    assert child["gap_to_float"]["mAP"]["value"] == child["metrics"]["mAP"] - other["metrics"]["mAP"]
    assert orphan["gap_to_float"]["mAP"]["value"] is None
    assert "2 float runs" in orphan["gap_to_float"]["mAP"]["reason"]


def _change(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("dataset", "fingerprint", value="e" * 64), r"dataset\.fingerprint is 'f+' and 'e+'"),
        (_change("dataset", "split", value="train"), r"dataset\.split is 'val' and 'train'"),
        (
            _change("dataset", "version", value="v1.0-mini"),
            "version is 'v1.0-trainval' and 'v1.0-mini'",
        ),
        (_change("dataset", "num_samples", value=3), r"dataset\.num_samples is 40 and 3"),
        (_change("postprocessing_sha256", value="other"), "postprocessing_sha256 is 'nms' and 'other'"),
        (
            _change("classes", value=dict(reversed(NUSCENES.to_dict().items()))),
            r"classes is \['car', 'truck', .*'traffic_cone'\] and \['traffic_cone', .*'car'\]; accepted: "
            ".*classes in the same order",
        ),
    ],
)
def test_refuses_different_data(
    arms: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = read_metrics(arms["qat"] / "metrics.json")
    change(document)
    (tmp_path / "changed").mkdir()
    write_metrics(tmp_path / "changed/metrics.json", document)
    with pytest.raises(UserError, match=message) as error:
        compare([arms["float"], tmp_path / "changed"], tmp_path / "report")
    assert str(arms["float"]) in str(error.value)
    assert str(tmp_path / "changed") in str(error.value)
    assert not (tmp_path / "report").exists()


def test_refuses_other_rules_of_a_class(tmp_path: Path) -> None:
    for range_m in (40.0, 60.0):
        write_own_arm(tmp_path / f"to_{range_m:g}", "float", range_m)
    with pytest.raises(UserError, match=r"classes is \{'car': .*40\.0.*\} and \{'car': .*60\.0"):
        compare([tmp_path / "to_40", tmp_path / "to_60"], tmp_path / "report")


def test_pictures_reach_as_far_as_the_classes(tmp_path: Path) -> None:
    """A detection 120 m to the left lies inside a picture of classes that count up to 150 m."""
    write_own_arm(tmp_path / "float", "float", 150.0)
    box = np.array([[-120.0, 0, 0, 8, 8, 2, 0, 0, 0]])
    none, label = np.zeros((0, 9)), np.ones(1, int)
    sample = BevSample("token", np.zeros((1, 3)), none, label[:0], box, np.ones(1), label)
    write_bev_sample(tmp_path / "float/bev_sample.npz", sample)
    compare([tmp_path / "float"], tmp_path / "report")
    pixels = matplotlib.image.imread(tmp_path / "report/pictures/bev_token.png")[:700, :, :3]
    wanted = np.array([int(DETECTION_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    columns = np.flatnonzero((np.abs(pixels - wanted).max(axis=2) < 0.02).any(axis=0))
    assert 50 < columns.min() < columns.max() < 150


def test_refuses_other_samples(arms: dict[str, Path], tmp_path: Path) -> None:
    found = write_arm(tmp_path / "other", "qat", 0.4)
    found.matches.sample_token[3] = "elsewhere"
    write_matches(tmp_path / "other/matches.npz", found.matches)
    with pytest.raises(UserError, match="hold different samples"):
        compare([arms["float"], tmp_path / "other"], tmp_path / "report")


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory to compare"):
        compare([], tmp_path)
    with pytest.raises(UserError, match=r"metrics file .*absent.metrics\.json' does not exist"):
        compare([tmp_path / "absent"], tmp_path)


@pytest.mark.parametrize(
    ("scores", "share"),
    [((0.5, 0.4, 0.45), 0.5), ((0.5, 0.4, 0.6), 2), ((0.5, 0.4, 0.3), -1), ((0.4, 0.4, 0.5), None)],
)
def test_share_won_back(scores: tuple[float, float, float], share: float | None) -> None:
    assert share_won_back(*scores) == (None if share is None else pytest.approx(share))


def test_starts_without_torch() -> None:
    heavy = {"torch", "lightning", "nuscenes", "matplotlib"}
    code = f"import sys, cpq_train.report.compare; print({heavy} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"
