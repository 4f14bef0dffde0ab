"""The arms of a tiny model logged to W&B offline, read back from its files by `offline_run`."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from offline_run import OfflineRun, offline_runs
from tiny_model import BASE, OVERLAY, tiny_options

from cpq_train.common.files import sha256_of
from cpq_train.verbs.cli import main

WANDB = ("--trainer.logger", "WandbRunLogger")
BOTH = ("--trainer.logger+=WandbRunLogger", "--trainer.logger+=CSVRunLogger")
OF_THE_CLOCK = {
    *("latency_ms/step", "val/latency_ms/step"),
    *("throughput/samples_per_s", "throughput/data_wait_share"),
}


def _artifact(path: Path) -> str:
    return f"checkpoint-{sha256_of(path)[:12]}"


def _scored(run_dir: Path) -> str:
    """The artifact of the checkpoint that the run's `metrics.json` is about."""
    return f"checkpoint-{json.loads((run_dir / 'metrics.json').read_text())['checkpoint']['sha256'][:12]}"


def _options(root: Path, run_dir: Path, num_epochs: int = 1) -> list[str]:
    options = tiny_options(root, run_dir)
    options[options.index("--trainer.max_epochs") + 1] = str(num_epochs)
    return [*options, "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name))
        yield


@pytest.fixture(scope="module")
def experiment(simulated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float, PTQ and QAT of one experiment; then the QAT job is requeued after its first epoch."""
    runs = tmp_path_factory.mktemp("logged") / "tiny"
    main(["fit", "-c", BASE, *_options(simulated_root, runs / "float"), *WANDB])
    tune = ["-c", BASE, "-c", OVERLAY]
    weights = ["--model.weights", str(runs / "float/checkpoints/last.ckpt")]
    ptq = str(runs / "ptq/ptq.ckpt")
    # The run directory of a calibration is the folder of its output.
    elsewhere = _options(simulated_root, runs / "elsewhere")
    main(["calibrate", *tune, *elsewhere, *weights, "--output", ptq, *WANDB])
    main(["validate", "-c", BASE, *_options(simulated_root, runs / "ptq"), "--model.weights", ptq, *WANDB])
    fit = ["fit", *tune, *_options(simulated_root, runs / "qat", 2), "--model.weights", ptq]
    fit += ["--checkpoint.save_top_k", "-1", *BOTH]
    main(fit)
    shutil.copy(runs / "qat/metrics.csv", runs / "undisturbed.csv")
    (first,) = (runs / "qat/checkpoints").glob("epoch00*.ckpt")
    main([*fit, "--ckpt_path", str(first)])
    return runs


@pytest.fixture(scope="module")
def logged(experiment: Path) -> dict[str, list[OfflineRun]]:
    """Arm -> its runs, oldest first."""
    return {arm: offline_runs(experiment / arm) for arm in ("float", "ptq", "qat")}


def test_group_and_job_type(experiment: Path, logged: dict[str, list[OfflineRun]]) -> None:
    """Also where `model.arm` is null and the arm comes from the weights, and for calibrate and validate."""
    for arm, runs in logged.items():
        for run in runs:
            assert (run.run.run_group, run.run.job_type) == ("tiny", arm)
            assert run.run.display_name == f"tiny-{arm}"
            assert run.exit_code == 0
    assert [len(runs) for runs in logged.values()] == [1, 2, 2]
    assert not (experiment / "elsewhere").exists()


def test_one_run_per_run_directory(logged: dict[str, list[OfflineRun]]) -> None:
    ids = {arm: {run.run.run_id for run in runs} for arm, runs in logged.items()}
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == 3


def test_config(logged: dict[str, list[OfflineRun]]) -> None:
    (float_run,), (ptq, _), (qat, _) = logged.values()
    assert (float_run.config["arm"], float_run.config["scheme"], float_run.config["bits"]) == (
        "float",
        None,
        {},
    )
    for run, arm in ((ptq, "ptq"), (qat, "qat")):
        assert (run.config["arm"], run.config["scheme"]) == (arm, "int8")
        assert run.config["bits"] == {"weight": 8, "input": 8}
        assert set(run.run.tags) == {"v1.0-trainval", "int8"}
    assert qat.config["model"]["network"]["voxel_size"] == [0.64, 0.64, 0.32]
    assert qat.config["trainer"]["max_epochs"] == 2
    assert "max_epochs" not in qat.config
    for run in (float_run, ptq, qat):
        settings = {k: n for k, n in run.num_config_updates.items() if not k.startswith("_")}
        assert set(settings.values()) == {1}


def test_history_and_summary(experiment: Path, logged: dict[str, list[OfflineRun]]) -> None:
    """The numbers of the CSV file, against the step; the summary keeps the best."""
    qat, resumed = logged["qat"]
    header, *rows = (line.split(",") for line in (experiment / "undisturbed.csv").read_text().splitlines())
    for key in ("train/loss", "val/NDS", "lr-AdamW"):
        column = header.index(key)
        expected = [(int(row[header.index("step")]), float(row[column])) for row in rows if row[column]]
        assert qat.at_step(key) == expected
        second_epoch = [(step, value) for step, value in expected if step >= 3]
        assert resumed.at_step(key) == second_epoch, "a requeued job goes on behind its checkpoint"
    assert qat.metrics["*"].step_metric == "trainer/global_step"
    assert qat.metrics["val/NDS"].step_metric == "trainer/global_step"
    values = [value for _, value in qat.at_step("val/NDS")]
    assert qat.summary["val/NDS"] == {"max": max(values), "last": values[-1]}


def test_csv_of_a_requeued_job(experiment: Path) -> None:
    """The same rows, and the same numbers but for those of the clock."""
    resumed, undisturbed = (
        [
            {name: bool(value) if name in OF_THE_CLOCK else value for name, value in row.items()}
            for row in csv.DictReader((experiment / file).read_text().splitlines())
        ]
        for file in ("qat/metrics.csv", "undisturbed.csv")
    )
    assert resumed[0].keys() >= OF_THE_CLOCK
    assert resumed == undisturbed


def test_layers_are_logged(logged: dict[str, list[OfflineRun]]) -> None:
    """The whole step and ten layers, of each interval and of each validation at the step of its scores."""
    qat, resumed = logged["qat"]
    (_, validated) = logged["ptq"]
    for prefix, kind, steps in (
        ("", "latency_ms", [0, 3]),
        ("val/", "latency_ms", [2, 5]),
        ("", "memory_mib", [1, 4]),
        ("val/", "memory_mib", [2, 5]),
    ):
        names = {name for row in qat.history for name in row if name.startswith(f"{prefix}{kind}/")}
        assert f"{prefix}{kind}/step" in names
        assert len(names) == 11
        for name in names:
            assert [step for step, _ in qat.at_step(name)] == steps
        assert [step for step, _ in resumed.at_step(f"{prefix}{kind}/step")] == steps[1:]
        assert len(validated.at_step(f"{prefix}{kind}/step")) == bool(prefix)
    assert [step for step, _ in qat.at_step("throughput/samples_per_s")] == [2, 5]


def test_validate_logs_the_score(experiment: Path, logged: dict[str, list[OfflineRun]]) -> None:
    scores = json.loads((experiment / "ptq/metrics.json").read_text())["metrics"]
    assert logged["ptq"][1].at_step("val/NDS") == [(0, pytest.approx(scores["NDS"]))]


def test_validate_of_another_run(experiment: Path, tmp_path: Path) -> None:
    """The arm is the checkpoint's, which is read; its score stands at the step that it was saved at."""
    config, folder = str(experiment / "qat/config.yaml"), tmp_path / "exp/again"
    (checkpoint,) = (experiment / "qat/checkpoints").glob("epoch00*.ckpt")
    main(
        ["validate", "-c", config, "--ckpt_path", str(checkpoint), "--trainer.default_root_dir", str(folder)]
    )
    (run,) = offline_runs(folder)
    assert (run.run.run_group, run.run.job_type) == ("exp", "qat")
    assert run.read_artifacts() == [_artifact(checkpoint)]
    assert [step for step, _ in run.at_step("val/NDS")] == [2]
    assert not (folder / "metrics.csv").exists()


def test_a_checkpoint_that_an_earlier_release_converted(
    experiment: Path, simulated_root: Path, tmp_path: Path
) -> None:
    """It says nothing of a training; its score stands at the start."""
    content = torch.load(experiment / "float/checkpoints/last.ckpt", weights_only=True)
    written = ("state_dict", "hyper_parameters", "quantization")
    torch.save({key: content[key] for key in written}, tmp_path / "float.ckpt")
    options = [
        *_options(simulated_root, tmp_path / "exp/float"),
        "--model.weights",
        str(tmp_path / "float.ckpt"),
    ]
    main(["validate", "-c", BASE, *options, *WANDB])
    (run,) = offline_runs(tmp_path / "exp/float")
    assert run.read_artifacts() == [_artifact(tmp_path / "float.ckpt")]
    assert json.loads(run.artifacts[0].metadata)["global_step"] == 0
    assert [step for step, _ in run.at_step("val/NDS")] == [0]


def test_lineage(experiment: Path, logged: dict[str, list[OfflineRun]]) -> None:
    """QAT reads the artifact that PTQ wrote, which reads the one that float wrote: same name, same digest."""
    (float_run,), (ptq, validated), (qat, resumed) = logged.values()
    last = _artifact(experiment / "float/checkpoints/last.ckpt")
    calibrated = _artifact(experiment / "ptq/ptq.ckpt")
    assert float_run.read_artifacts() == []
    assert last == _scored(experiment / "float")
    assert float_run.written()[last] >= {"latest", "last"}
    assert ptq.read_artifacts() == [last]
    assert list(ptq.written()) == [calibrated]
    assert (validated.read_artifacts(), validated.written()) == ([], {}), "its own checkpoint"
    assert qat.read_artifacts() == [calibrated]
    assert resumed.read_artifacts() == []
    assert resumed.written()[_scored(experiment / "qat")] >= {"latest", "last"}
    assert [name for name, aliases in qat.written().items() if "best" in aliases]
    everything = [a for runs in logged.values() for run in runs for a in run.artifacts]
    for name in (last, calibrated):
        assert len({a.digest for a in everything if a.name == name}) == 1
        assert {a.type for a in everything if a.name == name} == {"model"}


def test_metadata_of_artifacts(experiment: Path, logged: dict[str, list[OfflineRun]]) -> None:
    resumed = logged["qat"][1]
    name = _scored(experiment / "qat")
    (metadata,) = (json.loads(a.metadata) for a in resumed.artifacts if a.name == name)
    scores = json.loads((experiment / "qat/metrics.json").read_text())["metrics"]
    assert metadata["NDS"] == pytest.approx(scores["NDS"])
    assert metadata["mAP"] == pytest.approx(scores["mAP"])
    assert (metadata["arm"], metadata["scheme"], metadata["global_step"]) == ("qat", "int8", 6)
    ptq = sha256_of(experiment / "ptq/ptq.ckpt")
    assert metadata["parents"] == {"float": sha256_of(experiment / "float/checkpoints/last.ckpt"), "ptq": ptq}


def test_two_ranks_make_one_run(experiment: Path, simulated_root: Path, tmp_path: Path) -> None:
    options = _options(simulated_root, tmp_path / "exp/qat")
    options += ["--model.weights", str(experiment / "ptq/ptq.ckpt")]
    options += [BOTH[0], "--trainer.logger.log_model", "false", BOTH[1]]
    ranks = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launcher, "-m", "cpq_train", "fit", "-c", BASE, "-c", OVERLAY, *options, *ranks],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    (run,) = offline_runs(tmp_path / "exp/qat")
    assert (run.run.run_group, run.run.job_type) == ("exp", "qat")
    assert [step for step, _ in run.at_step("train/loss")] == [0, 1]  # 5 samples in batches of 2 x 2
    # A header, then learning rate, loss and drift of ranges of each step, and the score; throughput, and time
    # and memory of a step and of a validation.
    assert (tmp_path / "exp/qat/metrics.csv").read_text().count("\n") == 1 + 2 * 3 + 1 + 5


def test_a_failed_run_says_so(experiment: Path, simulated_root: Path, tmp_path: Path) -> None:
    options = _options(simulated_root, tmp_path / "run")
    options += ["--model.weights", str(experiment / "float/checkpoints/last.ckpt")]
    none = ["--data.num_calibration_samples", "0", "--output", str(tmp_path / "exp/p.ckpt")]
    with pytest.raises(SystemExit):
        main(["calibrate", "-c", BASE, "-c", OVERLAY, *options, *none, *WANDB])
    (run,) = offline_runs(tmp_path / "exp")
    assert run.exit_code == 1
    assert wandb.run is None


OUTLIVING = """
import os, signal, sys
from pathlib import Path
from cpq_train.loggers import WandbRunLogger
logger = WandbRunLogger()
logger.describe_run(sys.argv[1])
assert logger.experiment.offline
for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
    os.kill(int(pid), signal.SIGTERM)
    os.waitpid(int(pid), 0)
for step in range(3):  # it may take one until the connection is known to be lost
    logger.log_metrics({"a": 1.0}, step)
assert logger.open_run is None
logger.finalize("success")
print("done")
"""


def test_a_run_outlives_the_process_of_wandb(tmp_path: Path) -> None:
    """SLURM's SIGTERM ends that process, and the fit still has to be saved."""
    done = subprocess.run([sys.executable, "-c", OUTLIVING, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert "W&B's process is gone" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_login(
    simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**kwargs: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "-c", BASE, *_options(simulated_root, tmp_path / "run"), *WANDB])
    assert exit_.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "trainer.logger: W&B opens no run (No API key configured.); accepted: a login" in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_logging_off(simulated_root: Path, tmp_path: Path) -> None:
    """No file, and W&B is not even imported."""
    options = ["fit", "-c", BASE, *_options(simulated_root, tmp_path), "--trainer.logger", "false"]
    code = (
        f"import sys; from cpq_train.verbs.cli import main; main({options!r}); print('wandb' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert (tmp_path / "metrics.json").is_file()
    assert not (tmp_path / "metrics.csv").exists()
    assert not (tmp_path / "wandb").exists()


def test_tensorboard(simulated_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path / "tb")]
    main(["fit", "-c", BASE, *_options(simulated_root, tmp_path / "run"), *logger])
    assert list((tmp_path / "tb").rglob("events.out.tfevents.*"))


def test_checkpoints_stay_plain(experiment: Path) -> None:
    """A logger leaves nothing in a checkpoint that needs pickle."""
    assert torch.load(experiment / "qat/checkpoints/last.ckpt", map_location="cpu", weights_only=True)
