"""Data sets that are not quite nuScenes, by options alone: their own columns, classes, scenes and splits."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from command_line import fails
from own_categories import CLASSES, own_categories
from own_roots import FOUR, SIX, four_columns, six_columns_in_pcd
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.callbacks import predictions
from cpq_train.common.detection_task import DetectionTask
from cpq_train.verbs.cli import main

OF_DATA = {
    "point_columns": list(FOUR),
    "classes": CLASSES,
    "train_split": "fahrten",
    "val_split": "pruefung",
    "test_split": "pruefung",
}


class Road(NamedTuple):
    """A root, its configuration, and the runs that were made of it."""

    root: Path
    config: Path
    runs: Path

    def options(self, run: str, *overlays: str) -> list[str]:
        files = [option for file in (BASE, *overlays, str(self.config)) for option in ("-c", file)]
        return [*files, *tiny_options(self.root, self.runs / run)]

    def metrics(self, run: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.runs / run / "metrics.json").read_text())
        return read


@pytest.fixture(scope="module")
def road(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Four columns, own categories, own splits: trained, calibrated, fine-tuned, validated and compared."""
    folder = tmp_path_factory.mktemp("own")
    own_categories(simulated_root, folder / "named")
    road = Road(four_columns(folder / "named", folder / "root"), folder / "own.yaml", folder / "runs")
    road.config.write_text(yaml.safe_dump({"data": OF_DATA}, sort_keys=False))
    short, weights = ["--trainer.limit_train_batches", "1"], str(road.runs / "float/checkpoints/last.ckpt")
    ptq = str(road.runs / "ptq/ptq.ckpt")
    main(["fit", *road.options("float"), *short])
    main(["calibrate", *road.options("ptq", OVERLAY), "--model.weights", weights, "--output", ptq])
    main(["validate", *road.options("ptq"), "--model.weights", ptq])
    main(["fit", *road.options("qat", OVERLAY), *short, "--model.weights", ptq])
    runs = [str(road.runs / arm) for arm in ("float", "ptq", "qat")]
    main(["compare", *runs, "--output", str(road.runs / "report")])
    return road


def test_scores_are_of_the_own_classes_and_have_no_nds(road: Road) -> None:
    for arm in ("float", "ptq", "qat"):
        metrics = road.metrics(arm)
        assert list(metrics["per_class"]) == list(CLASSES) == list(metrics["classes"])
        assert metrics["metrics"]["NDS"] is None
        assert metrics["dataset"]["split"] == "pruefung"
        assert metrics["per_class"]["hindernis"]["AOE"] is None
        assert list(metrics["per_range"]) == ["0-20", "20-25", "25-35", "35-60"]
    assert list((road.runs / "float/checkpoints").glob("epoch00-mAP0.*.ckpt"))
    report = (road.runs / "report/report.md").read_text()
    assert "the NDS is defined for nuScenes' ten" in report
    assert "fahrzeug" in report
    assert "NDS gap" not in report


def test_the_network_follows_classes_and_columns(road: Road) -> None:
    network = yaml.safe_load((road.runs / "float/config.yaml").read_text())["model"]["network"]
    assert network["class_names"] == list(CLASSES)
    assert network["class_groups"] == [[name] for name in CLASSES]
    assert network["num_point_features"] == 5  # x, y, z, intensity and the time lag


def test_clouds_are_predicted_with_what_the_checkpoint_says(
    road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[DetectionTask] = []
    monkeypatch.setattr(predictions, "draw_bev", lambda path, panels, task: tasks.append(task))
    clouds = [str(path) for path in sorted((road.root / "samples/LIDAR_TOP").iterdir())[:2]]
    run = ["predict", *road.options("float"), "--trainer.default_root_dir", str(tmp_path)]
    main([*run, "--model.weights", str(road.runs / "qat/checkpoints/last.ckpt"), "--clouds", *clouds])
    found = json.loads((tmp_path / "predictions.json").read_text())["results"]
    assert list(found) == clouds
    assert {box["detection_name"] for boxes in found.values() for box in boxes} <= set(CLASSES)
    assert [task.names for task in tasks] == [tuple(CLASSES)] * 2  # which say how far a picture reaches


def test_a_submission_of_own_classes_is_scored_to_the_same_numbers(road: Road, tmp_path: Path) -> None:
    options = tmp_path / "score.yaml"
    data = {name: OF_DATA[name] for name in ("classes", "val_split")}
    options.write_text(yaml.safe_dump({"data": {"root": str(road.root), **data}}, sort_keys=False))
    submission = str(road.runs / "qat/results_nusc.json")
    main(["score", submission, "--config", str(options), "--output", str(tmp_path / "scored")])
    scored = json.loads((tmp_path / "scored/metrics.json").read_text())
    assert scored["metrics"] == road.metrics("qat")["metrics"]
    assert scored["per_class"] == road.metrics("qat")["per_class"]
    runs = [str(road.runs / "float"), str(tmp_path / "scored")]
    main(["compare", *runs, "--output", str(tmp_path / "report"), "--fail_if", "AP:person<-1", "mAP>float+1"])


def test_runs_of_other_classes_are_not_compared(
    road: Road, arms: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(["compare", str(road.runs / "ptq"), str(arms["ptq"]), "--output", str(tmp_path)], capsys)
    assert "cannot be compared" in said


def test_objects_of_own_classes_are_sampled(road: Road, tmp_path: Path) -> None:
    options = tmp_path / "database.yaml"
    of_points = {"point_columns": list(FOUR), "classes": CLASSES, "split": "fahrten", "num_sweeps": 2}
    options.write_text(yaml.safe_dump(of_points, sort_keys=False))
    cache = ["--cache_dir", str(tmp_path / "cache")]
    main(
        [
            "build-gt-database",
            "--root",
            str(road.root),
            "--config",
            str(options),
            "--num_workers",
            "0",
            *cache,
        ]
    )
    fit = ["fit", *road.options("float"), "--trainer.default_root_dir", str(tmp_path / "run")]
    sampled = [
        "--data.gt_sampling.targets",
        "{fahrzeug: 8, person: 3}",
        "--data.cache_dir",
        str(tmp_path / "cache"),
    ]
    main([*fit, *sampled, "--data.class_balanced", "true", "--trainer.limit_train_batches", "1"])
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


def test_targets_of_other_classes_are_refused_before_any_work(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *road.options("float"), "--trainer.default_root_dir", str(tmp_path / "run")]
    said = fails([*fit, "--data.gt_sampling.targets", "{car: 8}"], capsys)
    assert "build-gt-database" in said
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data.point_columns", "[x, y, z, intensity, ring]"],
            "data.point_columns [x, y, z, intensity] would fit",
        ),
        (["--data.classes", "null"], "none counts"),
        (
            ["--data.classes", "{auto: {categories: [gibt.es.nicht]}}"],
            "names 'gibt.es.nicht', which table category has not; accepted: 'ding.kegel'",
        ),
        (
            ["--data.classes", "{auto: {categories: [kfz.pkw], attributes: [ruht, rollt]}}"],
            "names 'ruht', which table attr",
        ),
        (
            ["--data.train_split", "pruefung"],
            "data.train_split 'pruefung' holds 4 of the 4 samples of data.val_split",
        ),
        (["--evaluation.engine", "devkit"], "engine is 'devkit', which does not know data.classes"),
        (["--checkpoint.monitor", "val/NDS"], "accepted: val/mAP"),
        (["--checkpoint.monitor", "val/mAP_trained"], "accepted: val/mAP"),
        (["--data.val_split", "val"], "split 'val' holds no scene of"),
        (["--data.lidar_channel", "LIDAR_FRONT"], "data.lidar_channel is 'LIDAR_FRONT'; accepted: "),
        (["--model.network.num_point_features", "4"], "num_point_features is 4"),
        (
            ["--model.network.class_names", "[car]"],
            "class_names names 'car': accepted of data.classes are person",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_told_before_any_work(
    road: Road, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", *road.options("float"), "--trainer.default_root_dir", str(tmp_path / "run"), *options]
    assert message in fails(fit, capsys).replace("\n", " ")
    assert not (tmp_path / "run/checkpoints").exists()


def test_heads_keep_their_classes_in_whatever_order_the_data_set_has_them(
    road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = tmp_path / "turned.yaml"
    turned.write_text(
        yaml.safe_dump({"data": {**OF_DATA, "classes": dict(reversed(CLASSES.items()))}}, sort_keys=False)
    )
    ptq = ["--model.weights", str(road.runs / "ptq/ptq.ckpt")]
    validate = ["validate", "-c", BASE, "-c", str(turned), *tiny_options(road.root, tmp_path / "run"), *ptq]
    main(validate)
    scored = json.loads((tmp_path / "run/metrics.json").read_text())
    assert list(scored["per_class"]) == list(reversed(CLASSES))
    assert scored["per_class"] == road.metrics("ptq")["per_class"]
    groups = "[[hindernis], [fahrzeug], [person]]"
    said = fails([*validate, "--model.network.class_groups", groups], capsys)
    assert "was made for class_groups (('person',), ('fahrzeug',), ('hindernis',))" in said


def test_a_checkpoint_says_its_classes(road: Road, tmp_path: Path) -> None:
    only_splits = tmp_path / "splits.yaml"
    splits = {name: value for name, value in OF_DATA.items() if name.endswith("_split")}
    only_splits.write_text(yaml.safe_dump({"data": splits}))
    ptq = ["--model.weights", str(road.runs / "ptq/ptq.ckpt")]
    main(["validate", "-c", BASE, "-c", str(only_splits), *tiny_options(road.root, tmp_path / "run"), *ptq])
    assert (
        json.loads((tmp_path / "run/metrics.json").read_text())["metrics"] == road.metrics("ptq")["metrics"]
    )


def test_verify_takes_samples_of_an_own_split(road: Road, capsys: pytest.CaptureFixture[str]) -> None:
    verify = ["verify", str(road.runs / "ptq/ptq.ckpt"), "--root", str(road.root)]
    main([*verify, "--split", "pruefung"])
    assert "split 'val' holds no scene" in fails(verify, capsys)


def test_pcd_files_of_six_columns(simulated_root: Path, tmp_path: Path) -> None:
    root = six_columns_in_pcd(simulated_root, tmp_path / "root")
    columns = ["--data.point_columns", f"[{', '.join(SIX)}]"]
    fit = ["fit", "-c", BASE, *tiny_options(root, tmp_path / "float"), "--trainer.limit_train_batches", "1"]
    main([*fit, *columns])
    weights = str(tmp_path / "float/checkpoints/last.ckpt")
    ptq = str(tmp_path / "ptq/ptq.ckpt")
    on_ptq = ["-c", BASE, "-c", OVERLAY, *tiny_options(root, tmp_path / "ptq")]
    main(["calibrate", *on_ptq, "--model.weights", weights, "--output", ptq])
    main(["validate", *on_ptq, "--model.weights", ptq])
    clouds = [str(path) for path in sorted((root / "samples/LIDAR_TOP").glob("*.pcd"))[:1]]
    main(["predict", *on_ptq, "--model.weights", ptq, "--clouds", *clouds])
    main(["compare", str(tmp_path / "float"), str(tmp_path / "ptq"), "--output", str(tmp_path / "report")])
    network = yaml.safe_load((tmp_path / "float/config.yaml").read_text())["model"]["network"]
    assert network["num_point_features"] == 6
