"""Files of run folders that are cut, of another shape or beyond all bounds: one line says so."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scored_runs import write_arm

from cpq_train.common.errors import UserError
from cpq_train.loggers.csv_rows import append_rows, read_rows, rows_before, write_rows
from cpq_train.profiling.latency_file import read_latency
from cpq_train.report.amax_history import read_amax_history
from cpq_train.report.bev import read_bev_sample
from cpq_train.report.compare import compare
from cpq_train.report.runs import load_runs
from cpq_train.report.training_costs import describe_training_cost

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_arm(root / "float", "float", 0.2)
    write_arm(root / "qat", "qat", 0.6, {"float": "float"})
    return root


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy to damage, beside a whole float run."""
    for name in ("metrics.json", "matches.npz"):
        (tmp_path / name).write_bytes((runs / "qat" / name).read_bytes())
    return tmp_path


def _set(*keys: str, value: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def _trained(*names: str) -> Change:
    return _set("trained", value={"classes": list(names), "mAP": 0.1, "confidence": None})


ENGINE = {"name": "onnxruntime", "version": "1.32.0", "file": "qat.onnx", "sha256": "abc"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("metrics", "mAP", value=1e308), "mAP: got 1e.308, accepted: a finite number from 0 to 1"),
        (_set("metrics", "NDS", value=-0.1), "NDS: got -0.1, accepted: a finite number from 0 to 1"),
        (_set("metrics", "NDS", value=10**400), "NDS: got 1000"),
        (_set("metrics", "mATE", value=-1.0), "mATE: got -1.0, accepted: a finite number from 0 on"),
        (_set("per_class", "car", "AP", "mean", value=1e308), "car, AP, mean: got 1e"),
        (_set("per_class", "car", "AP", "0.5", value=None), "car, AP, 0.5: got None"),
        (_set("per_class", "car", "ATE", value=-1), "car, ATE: got -1, accepted: .* from 0 on, or null"),
        (_set("per_range", "0-20", "mAP", value=2), "0-20, mAP: got 2, accepted"),
        (_set("confidence", "mAP", value=[0.1, 1e308]), "confidence, mAP: got .*accepted: null or"),
        (_set("coverage", "sparse", value=[-1, 21]), "coverage: got .*accepted: a mapping of kind"),
        (_set("dataset", "num_samples", value=-40), "num_samples: got -40, accepted: a count above 0"),
        (_set("profile", value={"num_macs": "many"}), "profile, num_macs: got 'many', accepted: null or"),
        (_set("profile", value={"stored_bytes": -1}), "profile, stored_bytes: got -1, accepted: null or"),
        (_set("profile", value={"stored_bytes": 10**400}), "profile, stored_bytes: got 1000"),
        (_set("profile", value={"saved_bytes": {}}), "profile, saved_bytes: got {}, accepted: null or"),
        (_set("engine", value={"name": "onnxruntime"}), "engine: needs 'version'"),
        (_set("engine", value={**ENGINE, "sha256": 1}), "engine, sha256: got 1, accepted: a text"),
        (_set("engine", value=[]), r"engine: got \[\], accepted: a mapping"),
        (_set("parents", value="float"), "parents: got 'float', accepted: a mapping"),
        (_trained("zzz"), r"trained, classes: got \['zzz'\], accepted: one or more of car, .*, each once"),
        (_trained("car", "car"), r"trained, classes: got \['car', 'car'\]"),
        (_trained(), r"trained, classes: got \[\]"),
        (_set("classes", value={}), r"metrics.json: classes are 0; accepted: 1 to 127"),
        (_set("classes", value={"mAP": {"categories": ["a"]}}), "metrics.json: classes: a name is 'mAP'"),
    ],
)
def test_metrics(change: Change, message: str, run: Path, runs: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    del document["crc32"]
    change(document)
    (run / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as error:
        compare([runs / "float", run], run / "out")
    assert str(run) in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (run / "out/report.json").exists()


def test_files_of_two_scorings(run: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    del document["crc32"]
    _set("dataset", "num_samples", value=41)(document)
    (run / "metrics.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"metrics.json is of 41 samples, matches.npz of 40; accepted"):
        load_runs([run])


def _changed(run: Path, **changes: Any) -> None:
    with np.load(run / "matches.npz") as stored:
        columns = {name: stored[name] for name in stored.files}
    for name, change in changes.items():
        columns[name] = change(columns[name].copy()) if callable(change) else change
    np.savez(run / "matches.npz", **columns)


def _first(value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_scene": _first(10)}, r"sample_scene\[0\] is 10; accepted: 0 to 9"),
        ({"pred_sample": _first(40)}, r"pred_sample\[0\] is 40; accepted: 0 to 39"),
        ({"pred_label": _first(-1)}, r"pred_label\[0\] is -1; accepted: 0 to 9"),
        ({"pred_label": lambda x: x[::-1]}, "row .* of pred_score; accepted: sorted by class"),
        ({"pred_score": lambda x: np.sort(x)}, "row .* of pred_score; accepted: sorted by class"),
        ({"pred_score": _first(1e308)}, r"pred_score\[0\] is 1e\+308; accepted: 0 to 1"),
        ({"pred_score": _first(np.nan)}, r"pred_score\[0\] is nan; accepted: 0 to 1"),
        ({"pred_range_m": _first(np.inf)}, r"pred_range_m\[0\] is inf; accepted"),
        ({"pred_match": _first(10**6)}, r"pred_match\[0, 0\] is 1000000; accepted: -1 to"),
        ({"pred_match": _first(-2)}, r"pred_match\[0, 0\] is -2; accepted: -1 to"),
        ({"pred_match": lambda x: x[:3]}, r"pred_match has shape \(3, .*; accepted: \(4, "),
        ({"pred_match": lambda x: x.astype(float)}, "pred_match holds '<f8'; accepted: whole numbers"),
        ({"match_errors": lambda x: x[:-1]}, "match_errors; accepted: .* one for each match"),
        ({"match_errors": lambda x: x.T}, r"match_errors has shape \(5, "),
        ({"match_errors": _first(-1.0)}, r"match_errors\[0, 0\] is -1.0; accepted: .* or NaN"),
        ({"gt_label": _first(10)}, r"gt_label\[0\] is 10; accepted: 0 to 9"),
        ({"gt_sample": lambda x: x[:-1]}, "gt_label has shape"),
        ({"gt_num_points": _first(-5)}, r"gt_num_points\[0\] is -5; accepted"),
        ({"gt_token": lambda x: x.astype("S32")}, r"gt_token holds '\|S32'; accepted: texts"),
        ({"gt_token": lambda x: np.full_like(x, x[0])}, "gt_token holds .* times; accepted: each once"),
        ({"gt_token": lambda x: np.char.add("x", x)}, "hold different annotations"),
        ({"sample_token": lambda x: x[:-1]}, r"sample_scene has shape \(40,\); accepted: \(39\)"),
        ({"scene_name": lambda x: np.char.add("x", x)}, "hold different samples"),
        ({"thresholds_m": np.array([0.5, 1.0, 2.0, 5.0])}, r"thresholds_m is \[0.5, 1.0, 2.0, 5.0\]"),
        ({"thresholds_m": np.array("a")}, "thresholds_m holds '<U1'"),
        ({"schema": np.array([1, 1])}, "schema is None; accepted: 1"),
        ({"schema": np.array("1")}, "schema is '1'; accepted: 1"),
    ],
)
def test_matches(changes: dict[str, Any], message: str, run: Path, runs: Path) -> None:
    _changed(run, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_runs([runs / "float", run])
    assert str(run) in str(error.value)


SAMPLE = {
    "token": np.array("a"),
    "points": np.zeros((5, 3), np.float16),
    "gt_boxes": np.zeros((2, 9)),
    "gt_labels": np.zeros(2, int),
    "boxes": np.zeros((3, 9)),
    "scores": np.zeros(3),
    "labels": np.zeros(3, int),
    "gt_tokens": np.array(["b", "c"]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": np.array(["a", "b"])}, r"token has shape \(2,\)"),
        ({"token": np.array(1)}, "token holds '<i8'; accepted: texts"),
        ({"points": np.zeros((5, 2))}, r"points has shape \(5, 2\); accepted: \(5, 3\)"),
        ({"boxes": np.full((3, 9), np.nan)}, r"boxes\[0, 0\] is nan; accepted"),
        ({"gt_boxes": np.full((2, 9), 1e308)}, r"gt_boxes\[0, 0\] is 1e\+308; accepted"),
        ({"labels": np.full(3, 10)}, r"labels\[0\] is 10; accepted: 0 to 9"),
        ({"scores": np.zeros(2)}, r"scores has shape \(2,\); accepted: \(3\)"),
        ({"scores": np.full(3, -1.0)}, r"scores\[0\] is -1.0; accepted: 0 to 1"),
        ({"gt_tokens": np.array(["b"])}, r"gt_tokens has shape \(1,\); accepted: \(2\)"),
        ({"gt_tokens": np.array([1, 2])}, "gt_tokens holds '<i8'; accepted: texts"),
    ],
)
def test_samples_from_above(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bev_sample.npz", **SAMPLE)
    assert read_bev_sample(tmp_path / "bev_sample.npz").gt_tokens.tolist() == ["b", "c"]
    np.savez(tmp_path / "bev_sample.npz", **SAMPLE | changes)
    with pytest.raises(UserError, match=rf"bev_sample\.npz: .*{message}"):
        read_bev_sample(tmp_path / "bev_sample.npz")


DRIFT = "step,quantizer,amax,start_amax,clipped_share,sqnr_db\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{DRIFT}0,a,1,1,0,30", "line 2 is cut: '0,a,1,1,0,30'; accepted: lines with their end"),
        (f"{DRIFT}0,a,1,1\n", "line 2 is not readable .4 cells.*accepted: a cell for each of step"),
        (f"{DRIFT}0,a,1,1,0,30,5\n", "line 2 is not readable .7 cells"),
        (f"{DRIFT}0,a,1e308,1e-308,0,30\n", "line 2 .*amax is 1e308; accepted: a number from 0 to"),
        (f"{DRIFT}0,a,1e400,1,0,30\n", "line 2 .*amax is 1e400; accepted"),
        (f"{DRIFT}0,a,-1,1,0,30\n", "line 2 .*amax is -1; accepted"),
        (f"{DRIFT}0,a,1,1,2,30\n", "line 2 .*clipped_share is 2; accepted: a number from 0 to 1"),
        (f"{DRIFT}0,a,wide,1,0,30\n", "line 2 is not readable .could not convert"),
        (f"{DRIFT}-1,a,1,1,0,30\n", "line 2 .*step is -1; accepted"),
        (f"{DRIFT}nan,a,1,1,0,30\n", "line 2 .*step is nan; accepted"),
        (f'{DRIFT}0,"a,1,1,0,30\n', "line 2 is not readable .unexpected end of data"),
        (f"{DRIFT}0,{'a' * 200_000},1,1,0,30\n", "line 2 is not readable .field larger than"),
        (DRIFT.replace("amax,", "amax,amax,", 1), "each of them once"),
        (DRIFT.replace("quantizer", "layer"), r"columns \['quantizer'\] are missing; accepted: step"),
        (b"\xff\xfe" + DRIFT.encode(), "not readable as text"),
        (b"", r"columns .* are missing"),
    ],
)
def test_drifts(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "amax_drift.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"amax_drift.csv: .*{message}") as error:
        read_amax_history(file)
    assert len(str(error.value)) < 1000


def test_drifts_that_were_not_measured(tmp_path: Path) -> None:
    (tmp_path / "amax_drift.csv").write_text(f"{DRIFT}0,a,inf,1,,nan\n1,a,,,,\n")
    found = read_amax_history(tmp_path / "amax_drift.csv")["a"]
    assert [tuple(vars(reading).values()) for reading in found.values()] == [(None,) * 3] * 2


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e400", "slow", ""])
def test_training_costs(text: str, tmp_path: Path) -> None:
    (tmp_path / "layer_latency.csv").write_text(f"stage,layer,kind,ms\ntrain,a,b,{text}\n")
    with pytest.raises(UserError, match="line 2 is not readable"):
        describe_training_cost(tmp_path)


@pytest.mark.parametrize(
    "name", ["amax_drift.csv", "throughput.csv", "bev_sample.npz", "matches.npz", "x.png"]
)
def test_nothing_but_files_is_opened(name: str, run: Path, runs: Path) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(UserError, match="is a FIFO, socket or device"):
        compare([runs / "float", run], run / "out")


ROW = {
    **{"name": "qat", "arm": "qat", "file": "a", "sha256": "qat", "runs_as": "b", "summary": {}},
    **{"ms": 1.0, "min_ms": 1.0, "max_ms": 1.0, "cpu_ms": 1.0},
}
LATENCY = {
    **{"schema": 1, "input": "x", "device": "cpu", "torch": "2", "rows": [ROW]},
    **{"num_points": 1, "num_voxels": 1, "num_threads": 1, "num_passes": 1},
}


@pytest.mark.parametrize(("name", "value"), [("ms", 0), ("ms", 1e308), ("min_ms", -1.0), ("cpu_ms", "1")])
def test_latencies(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY))
    assert read_latency(tmp_path / "latency.json") == LATENCY
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY | {"rows": [ROW | {name: value}]}))
    with pytest.raises(UserError, match=f"latency.json, row 1, {name}: got "):
        read_latency(tmp_path / "latency.json")


def test_costs_beside_times(run: Path, tmp_path: Path) -> None:
    row = ROW | {"summary": {"num_macs": [1]}}
    (tmp_path / "latency.json").write_text(json.dumps(LATENCY | {"rows": [row]}))
    with pytest.raises(UserError, match=r"row 'qat', summary, num_macs: got .1., accepted: null or"):
        compare([run], tmp_path / "out", latency=tmp_path / "latency.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,x\nsoon,1\n", "line 2, step is 'soon'; accepted: a count"),
        ("step,x\n-1,1\n", "line 2, step is '-1'"),
        ("x\n1\n", r"columns \['step'\] are missing"),
        ("step,x\n1\n", "line 2 is not readable .1 cells"),
        ("step,x\n1,2,3\n", "line 2 is not readable .3 cells"),
        (b"step,x\n\xff,1\n", "not readable as text"),
        ("step,x\n\0,1\n", "line 2"),
    ],
)
def test_rows_of_a_run_that_is_resumed(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"metrics.csv: .*{message}"):
        rows_before(file, 10)


def test_a_row_that_was_cut_comes_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,x\n1,2\n2,")
    assert read_rows(tmp_path / "metrics.csv") == [{"step": "1", "x": "2"}]


def test_names_in_rows_come_back(tmp_path: Path) -> None:
    file, names = tmp_path / "layers.csv", ["=cmd|x", "'=x", "-a", "a,b", "two\nlines", "plain"]
    write_rows(file, ("step", "layer"), [{"step": 0, "layer": name} for name in names[:3]])
    append_rows(file, ("step", "layer"), [{"step": -1.5, "layer": name} for name in names[3:]])
    assert "'=cmd|x\n" in file.read_text()
    assert "-1.5," in file.read_text()
    write_rows(file, ("step", "layer"), [{**row, "step": 0} for row in _rows(file)])
    assert [row["layer"] for row in read_rows(file)] == names


def _rows(file: Path) -> list[dict[str, Any]]:
    file.write_text(file.read_text().replace("-1.5", "1"))
    return read_rows(file)


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "metrics.csv"
    write_rows(file, ("step", "x"), [{"step": 0, "x": 1}])
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            append_rows(file, ("step", "x"), [{"step": 10, "x": 12345}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["matches.npz", "metrics.json"])
def test_a_link_to_itself_is_no_missing_file(name: str, runs: Path, run: Path) -> None:
    (run / name).unlink()
    (run / name).symlink_to(run / name)
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        load_runs([runs / "float", run])
