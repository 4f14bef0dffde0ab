"""The verbs as a user runs them: all arms of a tiny model, their comparison, and every bad input."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import fails
from lightning.pytorch.accelerators import CUDAAccelerator
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.verbs import lightning_cli
from cpq_train.verbs.cli import main

Run = dict[str, Path]


def test_every_run_says_its_arm(arms: Run) -> None:
    for arm, folder in arms.items():
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["arm"] == arm
        assert metrics["dataset"]["num_samples"] == 4
        for name in ("config.yaml", "results_nusc.json", "matches.npz", "bev_sample.npz"):
            assert (folder / name).is_file()


def test_lineage(arms: Run) -> None:
    metrics = {arm: json.loads((folder / "metrics.json").read_text()) for arm, folder in arms.items()}
    sha = {arm: document["checkpoint"]["sha256"] for arm, document in metrics.items()}
    assert metrics["ptq"]["parents"] == {"float": sha["float"]}
    assert metrics["qat"]["parents"] == {"float": sha["float"], "ptq": sha["ptq"]}
    assert metrics["float_tuned"]["parents"] == {"float": sha["float"]}


def test_coverage_in_metrics(arms: Run) -> None:
    coverage = json.loads((arms["qat"] / "metrics.json").read_text())["coverage"]
    assert coverage == {
        "sparse": [20, 21],
        "ResidualAdd": [8, 8],
        "Conv2d": [85, 85],
        "ConvTranspose2d": [2, 2],
    }


def test_checkpoints_are_plain_and_describe_themselves(arms: Run) -> None:
    for arm, path in (("ptq", arms["ptq"] / "ptq.ckpt"), ("qat", arms["qat"] / "checkpoints/last.ckpt")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        description = checkpoint["quantization"]
        assert description["arm"] == arm
        assert description["schema"] == 2
        assert description["batchnorm"] == "folded"
        assert description["calibration"]["num_samples"] == 2
        assert len(description["layers"]) == 21 + 85 + 2 + 8
        layer = description["layers"]["dense_head.heads_list.0.hm.0.0"]
        assert layer["arithmetic"] == "integer"
        assert layer["weight"]["axis"] == 0
        assert layer["shares_input_with"] == "dense_head.heads_list.0.center.0.0"
        assert description["layers"]["backbone_2d.deblocks.1.0"]["weight"]["axis"] == 1


def test_qat_trained_with_frozen_amax(arms: Run) -> None:
    ptq = torch.load(arms["ptq"] / "ptq.ckpt", weights_only=True)["state_dict"]
    qat = torch.load(arms["qat"] / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert ptq.keys() == qat.keys()
    for name, value in ptq.items():
        assert torch.equal(value, qat[name]) == name.endswith("_amax"), name


def test_baselines_are_logged(arms: Run) -> None:
    header = (arms["qat"] / "metrics.csv").read_text().splitlines()[0]
    assert "val/NDS_minus_float" in header
    assert "val/mAP_minus_ptq" in header
    assert len(list((arms["qat"].parent / "baselines").glob("*.json"))) == 2


def test_the_float_baseline_is_the_float_arm(arms: Run) -> None:
    """Scored inside the QAT fit with quantizers off, it equals the float checkpoint's own score."""
    cached = [json.loads(f.read_text()) for f in (arms["qat"].parent / "baselines").glob("*.json")]
    metrics = json.loads((arms["float"] / "metrics.json").read_text())["metrics"]
    assert any(abs(score["NDS"] - metrics["NDS"]) < 0.02 for score in cached)


def test_compare(arms: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *(str(folder) for folder in arms.values()), "--output", str(tmp_path / "report")])
    report = (tmp_path / "report/report.md").read_text()
    for arm in arms:
        assert arm in report
    assert list((tmp_path / "report").rglob("*.png"))
    assert "NDS" in capsys.readouterr().out


def test_describe(arms: Run, capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", str(arms["ptq"] / "ptq.ckpt")])
    out = capsys.readouterr().out
    assert "ptq" in out
    assert "8 bit" in out
    assert "'num_sweeps': 2" in out


def test_config_of_a_fit_feeds_other_verbs(arms: Run, tmp_path: Path) -> None:
    """`--ckpt_path` loads a finished run with its own structure; the score is that of its last validation."""
    copy = tmp_path / "again"
    checkpoint = arms["qat"] / "checkpoints/last.ckpt"
    main(
        [
            "validate",
            "-c",
            str(arms["qat"] / "config.yaml"),
            "--ckpt_path",
            str(checkpoint),
            "--trainer.default_root_dir",
            str(copy),
        ]
    )
    again, before = (json.loads((d / "metrics.json").read_text()) for d in (copy, arms["qat"]))
    assert again["metrics"] == before["metrics"]
    assert again["arm"] == "qat"


def test_qat_from_float_weights_calibrates_first(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = arms["float"] / "checkpoints/last.ckpt"
    options = [*tiny_options(simulated_root, tmp_path / "qat"), "--trainer.enable_progress_bar", "null"]
    main(["fit", "-c", BASE, "-c", OVERLAY, *options, "--model.weights", str(weights)])
    _check_log(*capsys.readouterr())
    new = torch.load(tmp_path / "qat/checkpoints/last.ckpt", weights_only=True)
    ptq = torch.load(arms["ptq"] / "ptq.ckpt", weights_only=True)
    amax = {k: v for k, v in ptq["state_dict"].items() if k.endswith("_input_quantizer._amax")}
    assert amax
    for name, value in amax.items():
        assert torch.equal(new["state_dict"][name], value), name


def _check_log(out: str, err: str) -> None:
    """No terminal, no bars; each moment of the fit has its line."""
    assert "Epoch 0/0" not in out
    lines = [line[20:] for line in err.splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    expected = [
        "training begins: epoch 0/0, step 0/3",
        "saved at step 3",
        r"validation: epoch 0/0, step 3/3, mAP \S+ \(\S+ to float, \S+ to PTQ\), NDS \S+ \(.+\), 0:0\d:\d\d",
        r"training ends: step 3/3, 0:0\d:\d\d",
    ]
    assert len(lines) == len(expected), lines
    for pattern, line in zip(expected, lines, strict=True):
        assert re.fullmatch(pattern, line), line


def test_two_ranks_calibrate_as_one(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    """Three samples in batches of one, dealt to two processes that the verb itself starts."""
    weights = arms["float"] / "checkpoints/last.ckpt"
    options = ["calibrate", "-c", BASE, "-c", OVERLAY, *tiny_options(simulated_root, tmp_path / "run")]
    options += ["--data.batch_size", "1", "--data.num_calibration_samples", "3"]
    options += ["--model.weights", str(weights), "--output"]
    main([*options, str(tmp_path / "one.ckpt")])
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    threads = str(torch.get_num_threads())
    subprocess.run(
        [sys.executable, "-m", "cpq_train", *options, str(tmp_path / "two.ckpt"), *ranks],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=True,
        timeout=300,
    )
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("one", "two"))
    assert one["quantization"] == two["quantization"]
    assert one["quantization"]["calibration"]["num_samples"] == 3
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_resume_equals_uninterrupted(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    options = ["fit", "-c", BASE, "-c", OVERLAY, "--model.weights", str(arms["ptq"] / "ptq.ckpt")]

    def fit(run: Path, *more: str) -> dict[str, torch.Tensor]:
        tiny = tiny_options(simulated_root, run)
        tiny[tiny.index("--trainer.max_epochs") + 1] = "2"
        main([*options, *tiny, *more])
        return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = fit(tmp_path / "whole", "--checkpoint.save_top_k", "-1", "--checkpoint.every_n_epochs", "1")
    first = next(p for p in (tmp_path / "whole/checkpoints").glob("epoch00*.ckpt"))
    resumed = fit(tmp_path / "resumed", "--ckpt_path", str(first))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def _calibrate(root: Path, tmp_path: Path, weights: Path, *more: str) -> list[str]:
    options = ["calibrate", "-c", BASE, "-c", OVERLAY, *tiny_options(root, tmp_path / "run")]
    return [*options, "--model.weights", str(weights), "--output", str(tmp_path / "p.ckpt"), *more]


def test_ranges_of_a_file(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a file holds every range no sample is read; where one is missing it is found on samples."""
    weights, ptq = arms["float"] / "checkpoints/last.ckpt", arms["ptq"] / "ptq.ckpt"
    state = torch.load(ptq, weights_only=True)["state_dict"]
    amax = {f"module.{k}": 1.5 * v for k, v in state.items() if k.endswith("_amax")}
    torch.save(amax, tmp_path / "all.pth")
    options = _calibrate(simulated_root, tmp_path, weights)
    main([*options, "--ranges_file", str(tmp_path / "all.pth"), "--data.num_calibration_samples", "0"])
    new = torch.load(tmp_path / "p.ckpt", weights_only=True)
    for name, value in new["state_dict"].items():
        assert torch.equal(value, amax.get(f"module.{name}", state[name])), name
    assert new["quantization"]["calibration"]["num_samples"] == 0

    left_out = "network.backbone_2d.blocks.0.1._input_quantizer._amax"
    del amax[f"module.{left_out}"]
    torch.save(
        {"state_dict": {**amax, "module.neck.x._input_quantizer._amax": torch.ones(1)}}, tmp_path / "f"
    )
    capsys.readouterr()
    main([*options, "--ranges_file", str(tmp_path / "f")])
    new = torch.load(tmp_path / "p.ckpt", weights_only=True)
    for name, value in new["state_dict"].items():
        assert torch.equal(value, amax.get(f"module.{name}", state[name])), name
    assert new["quantization"]["calibration"]["num_samples"] == 2
    printed = capsys.readouterr().out
    assert left_out.removeprefix("network.") in printed
    assert "module.neck.x._input_quantizer._amax: no static quantizer of this name here" in printed


def _distilled(root: Path, run: Path, weights: Path, *more: str) -> list[str]:
    options = ["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(root, run), "--model.weights", str(weights)]
    return [*options, "--model.distillation.box_weight", "0.5", "--trainer.log_every_n_steps", "1", *more]


def test_distillation(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    """Its parts are logged, and the teacher leaves no trace in the checkpoint but its SHA-256."""
    teacher = arms["float"] / "checkpoints/last.ckpt"
    given = ("--model.distillation.teacher", str(teacher))
    main(_distilled(simulated_root, tmp_path, arms["ptq"] / "ptq.ckpt", *given))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/distill_heatmap", "train/distill_box", "train/distill_bev"} <= set(header)
    plain, new = (
        torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (arms["qat"], tmp_path)
    )
    assert new["state_dict"].keys() == plain["state_dict"].keys()
    num_states = [len(checkpoint["optimizer_states"][0]["state"]) for checkpoint in (plain, new)]
    assert num_states[0] == num_states[1]
    assert any(not torch.equal(new["state_dict"][k], v) for k, v in plain["state_dict"].items())
    assert new["quantization"]["parents"].pop("teacher") == new["quantization"]["parents"]["float"]
    assert new["quantization"]["parents"] == plain["quantization"]["parents"]


def test_resumed_distillation_equals_uninterrupted(arms: Run, simulated_root: Path, tmp_path: Path) -> None:
    """Started from float weights, which are then the teacher."""
    weights = arms["float"] / "checkpoints/last.ckpt"

    def fit(run: Path, *more: str) -> dict[str, torch.Tensor]:
        options = _distilled(simulated_root, run, weights, "--model.arm", "float_tuned", *more)
        options[options.index("--trainer.max_epochs") + 1] = "2"
        main(options)
        return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    whole = fit(tmp_path / "whole", "--checkpoint.save_top_k", "-1", "--checkpoint.every_n_epochs", "1")
    first = next(p for p in (tmp_path / "whole/checkpoints").glob("epoch00*.ckpt"))
    resumed = fit(tmp_path / "resumed", "--ckpt_path", str(first))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    "configs",
    [
        [BASE],
        [BASE, OVERLAY],
        ["configs/centerpoint_voxel01.yaml"],
        ["configs/centerpoint_voxel01.yaml", "configs/qat_int8.yaml"],
        ["configs/centerpoint_voxel0075.yaml", "configs/qat_int8.yaml"],
    ],
)
def test_shipped_configs(configs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *(option for config in configs for option in ("-c", config)), "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["arm"] == ("qat" if len(configs) == 2 else None)


# Bad input: exit code 2, the thing, the value and what is accepted; no traceback.


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown verb 'train'; accepted: fit, validate, test, predict, calibrate" in fails(
        ["train"], capsys
    )


def test_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "model.wieghts" in fails(["fit", "-c", BASE, "--model.wieghts", "x"], capsys)


def test_missing_data_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["fit", "-c", BASE, *tiny_options(tmp_path / "nowhere", tmp_path / "run")], capsys)
    assert "nowhere" in error


def test_wrong_version(simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*tiny_options(simulated_root, tmp_path / "run"), "--data.version", "v1.0-mini"]
    error = fails(["fit", "-c", BASE, *options], capsys)
    assert "v1.0-mini" in error
    assert "v1.0-trainval" in error


def _validate(root: Path, tmp_path: Path, weights: Path, *more: str) -> list[str]:
    return [
        "validate",
        "-c",
        BASE,
        *tiny_options(root, tmp_path / "run"),
        "--model.weights",
        str(weights),
        *more,
    ]


def test_checkpoint_of_another_architecture(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = arms["float"] / "checkpoints/last.ckpt"
    error = fails(_validate(simulated_root, tmp_path, weights, "--model.network.head_channels", "24"), capsys)
    assert "another architecture" in error
    assert "dense_head" in error


def test_corrupt_checkpoint(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (arms["float"] / "checkpoints/last.ckpt").read_bytes()
    for content in (whole[: len(whole) // 2], b"no checkpoint", b""):
        (tmp_path / "bad.ckpt").write_bytes(content)
        assert "is corrupt" in fails(_validate(simulated_root, tmp_path, tmp_path / "bad.ckpt"), capsys)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("raw", [False, True])
def test_pickled_code_is_refused_and_not_run(
    raw: bool, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, file = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": {}, "quantization": _Payload(victim)}
    if raw:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    assert "pickled code and is refused" in fails(_validate(simulated_root, tmp_path, file), capsys)
    assert not victim.exists()


def test_missing_and_foreign_checkpoint(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in fails(_validate(simulated_root, tmp_path, tmp_path / "none.ckpt"), capsys)
    torch.save({"model_state": {}}, tmp_path / "foreign.ckpt")
    error = fails(_validate(simulated_root, tmp_path, tmp_path / "foreign.ckpt"), capsys)
    assert "model_state" in error
    assert "expected state_dict and quantization" in error


def test_empty_calibration_set(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _calibrate(simulated_root, tmp_path, arms["float"] / "checkpoints/last.ckpt")
    error = fails([*options, "--data.num_calibration_samples", "0"], capsys)
    assert "num_calibration_samples is 0: expected 1 to 6" in error
    assert not (tmp_path / "p.ckpt").exists()


def test_unfit_range_in_a_file(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "backbone_2d.blocks.0.1._input_quantizer"
    torch.save({f"{name}._amax": torch.tensor(-1.0)}, tmp_path / "f.pth")
    options = _calibrate(simulated_root, tmp_path, arms["float"] / "checkpoints/last.ckpt")
    error = fails([*options, "--ranges_file", str(tmp_path / "f.pth")], capsys)
    assert f"{name} Conv2d negative 1 of 1" in error
    assert not (tmp_path / "p.ckpt").exists()


def test_scheme_matching_no_layer(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"rules": [{"layers": "neck.*", "weight": "off"}]}))
    options = ["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(simulated_root, tmp_path / "run")]
    options += ["--model.weights", str(arms["float"] / "checkpoints/last.ckpt")]
    error = fails([*options, "--model.scheme", str(tmp_path / "s.yaml")], capsys)
    assert "'neck.*'" in error
    assert "matches no layer" in error


def test_another_scheme_than_the_checkpoints(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"name": "w4", "defaults": {"weight": {"bits": 4}}}))
    options = ["fit", "-c", BASE, "-c", OVERLAY, *tiny_options(simulated_root, tmp_path / "run")]
    options += ["--model.weights", str(arms["ptq"] / "ptq.ckpt"), "--model.scheme", str(tmp_path / "s.yaml")]
    error = fails(options, capsys)
    assert "was calibrated with another scheme" in error
    assert "defaults.weight.bits: checkpoint 8, model.scheme 4" in error
    assert "granularity" not in error  # equal in both


def test_arm_that_cannot_descend(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qat = arms["qat"] / "checkpoints/last.ckpt"
    error = fails(_validate(simulated_root, tmp_path, qat, "--model.arm", "float"), capsys)
    assert "'float' cannot start from" in error


def test_validate_without_a_checkpoint(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(["validate", "-c", BASE, *tiny_options(simulated_root, tmp_path / "run")], capsys)
    assert "validate needs model.weights, --ckpt_path or model.engine_file" in error


def test_ckpt_path_is_checked_too(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["validate", "-c", BASE, *tiny_options(simulated_root, tmp_path / "run")]
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    assert "is corrupt" in fails([*options, "--ckpt_path", str(tmp_path / "bad.ckpt")], capsys)
    content = torch.load(arms["qat"] / "checkpoints/last.ckpt", weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "less.ckpt")
    error = fails([*options, "--ckpt_path", str(tmp_path / "less.ckpt")], capsys)
    assert "1 quantizers have no usable amax" in error
    assert "missing" in error


def test_arms_that_fit_does_not_make(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "-c", BASE, *tiny_options(simulated_root, tmp_path / "run")]
    error = fails([*fit, "--model.weights", str(arms["ptq"] / "ptq.ckpt")], capsys)
    assert "fit makes float, float_tuned or qat" in error
    error = fails([*fit, "-c", OVERLAY], capsys)
    assert "model.arm 'qat' starts from a checkpoint" in error


def test_distillation_without_a_float_teacher(
    arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = _distilled(simulated_root, tmp_path / "run", arms["ptq"] / "ptq.ckpt")
    assert "is 'ptq': give model.distillation.teacher" in fails(options, capsys)
    wrong = ("--model.distillation.teacher", str(arms["qat"] / "checkpoints/last.ckpt"))
    assert "is 'qat': give model.distillation.teacher" in fails([*options, *wrong], capsys)
    options = ["fit", "-c", BASE, *tiny_options(simulated_root, tmp_path / "run")]
    error = fails([*options, "--model.distillation.bev_weight", "1"], capsys)
    assert "model.distillation is for model.arm qat or float_tuned, not for 'float'" in error


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_nan_in_a_cloud(
    num_workers: str, arms: Run, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(simulated_root, root)
    for cloud in sorted((root / "samples/LIDAR_TOP").glob("*.bin")):
        points = np.fromfile(cloud, np.float32)
        points[7] = np.nan
        points.tofile(cloud)
    weights = arms["float"] / "checkpoints/last.ckpt"
    error = fails(_validate(root, tmp_path, weights, "--data.num_workers", num_workers), capsys)
    assert ".pcd.bin" in error
    assert "sample" in error
    assert "NaN" in error


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_freed_memory_is_kept_on_the_cpu_alone(
    is_on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(lightning_cli, "keep_freed_memory", lambda: calls.append(None))
    if not is_on_cpu:
        monkeypatch.setattr(lightning_cli, "CPUAccelerator", CUDAAccelerator)
    run = ["calibrate", "-c", BASE, *tiny_options(Path("nowhere"), tmp_path), "--output", str(tmp_path / "o")]
    assert "starts from model.weights" in fails([*run, "--trainer.accelerator", "cpu"], capsys)
    assert len(calls) == is_on_cpu
