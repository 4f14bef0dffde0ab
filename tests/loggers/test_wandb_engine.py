"""A deployment file that is scored, logged to W&B offline and read back."""

from pathlib import Path

import pytest
from exported_files import exported, stating
from offline_run import offline_runs
from old_files import small_options

from cpq_train.common.files import sha256_of
from cpq_train.evaluation.metrics_file import read_metrics
from cpq_train.export.sidecar import read_sidecar
from cpq_train.verbs.cli import main

pytestmark = pytest.mark.usefixtures("ddp_leaves_nothing")


@pytest.mark.parametrize("has_weights", [False, True])
def test_its_job_type_is_deployed(
    has_weights: bool, simulated_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that it comes from is an artifact where it is at hand."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name))
    checkpoint = stating(tmp_path / "files", "qat")
    engine, run_dir = exported(checkpoint, tmp_path / "files"), tmp_path / "tiny/exported"
    weights = ["--model.weights", str(checkpoint)] if has_weights else []
    options = [*small_options(simulated_root, run_dir), "--model.engine_file", str(engine), *weights]
    main(["validate", *options, "--trainer.logger", "WandbRunLogger"])
    (run,) = offline_runs(run_dir)
    assert (run.run.run_group, run.run.job_type, run.run.display_name) == (
        "tiny",
        "deployed",
        "tiny-deployed",
    )
    assert set(run.run.tags) == {"v1.0-trainval", "int8"}
    assert run.exit_code == 0
    found = read_metrics(run_dir / "metrics.json")
    assert run.at_step("val/NDS") == [(0, pytest.approx(found["metrics"]["NDS"]))]
    assert (run.config["arm"], run.config["scheme"]) == ("deployed", "int8")
    assert run.config["engine"] == found["engine"]
    assert run.config["parents"] == found["parents"]
    assert run.config["parents"]["qat"] == sha256_of(checkpoint)
    assert run.config["model"]["engine_file"] == str(engine)
    used = [f"checkpoint-{read_sidecar(engine).checkpoint['sha256'][:12]}"] if has_weights else []
    assert run.read_artifacts() == used
    assert run.written() == {}
    assert [path.name for path in (run_dir / "wandb").glob("*.id")] == ["deployed.id"]
    assert not (run_dir / "layer_latency.csv").exists(), "an engine has no layers to measure"
