"""The scripts that start a fit on several devices: torchrun's, and SLURM's with a stand-in for SLURM."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = ("scripts/torchrun_fit.sh", "scripts/slurm_fit.sbatch")
FIT = [
    *("-c", "configs/quickstart_float.yaml", "--model.network.voxel_size", "[0.64, 0.64, 0.32]"),
    *("--model.network.backbone_3d_channels", "[4, 4, 8, 8]"),
    *("--model.network.backbone_3d_num_blocks", "[1, 1, 1, 1]"),
    *("--model.network.backbone_2d_num_layers", "[1, 1]", "--model.network.head_channels", "8"),
    *("--data.num_sweeps", "1", "--data.batch_size", "1", "--data.num_workers", "0"),
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--checkpoint.monitor", "null"),
]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(script: str, arguments: list[str], **environment: str) -> str:
    """Run a script with these variables; returns what it printed."""
    ours = {"PYTHON": sys.executable, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        ["bash", script, *arguments],
        env={**os.environ, **ours, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def _options(root: Path, run: Path) -> list[str]:
    return [*FIT, "--data.root", str(root), "--trainer.default_root_dir", str(run)]


def _check(run: Path, printed: str) -> None:
    """Two ranks trained together: 6 samples, of which each took 2 in batches of 1."""
    assert "Starting with 2 processes" in printed
    last: dict[str, Any] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    rows = (run / "metrics.csv").read_text().splitlines()
    assert "train/loss" in rows[0]
    assert len([row for row in rows[1:] if row]) >= 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = Path(script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n#")
    assert "set -euo pipefail" in text
    assert text.index('"$@"') < text.index("--ckpt_path last")
    assert not re.search(r"\$@[^\"]", text)  # never unquoted


def test_slurm_directives() -> None:
    text = Path("scripts/slurm_fit.sbatch").read_text()
    directives = re.findall(r"^#SBATCH (--[a-z-]+)", text, re.M)
    assert {"--ntasks-per-node", "--signal", "--requeue", "--open-mode"} <= set(directives)
    # sbatch reads them up to the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo")


def test_several_nodes_need_a_meeting_point() -> None:
    finished = subprocess.run(
        ["bash", "scripts/torchrun_fit.sh"],
        env={**os.environ, "NUM_NODES": "2", "NUM_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode != 0
    assert "set RENDEZVOUS to host:port" in finished.stderr


def test_torchrun(simulated_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {"NUM_DEVICES": "2", "MAX_RESTARTS": "0"}
    _check(run, _run("scripts/torchrun_fit.sh", _options(simulated_root, run), **environment))
    longer = [*_options(simulated_root, run), "--trainer.max_epochs", "2"]
    printed = _run("scripts/torchrun_fit.sh", longer, **environment)
    assert "Restoring states from the checkpoint path" in printed
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def slurm_environment(folder: Path, num_tasks: int = 2) -> dict[str, str]:
    """The variables of a job on one node, with stand-ins for SLURM's programs; they write into `folder`."""
    return {
        "PATH": f"{Path('tests/slurm').resolve()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FAKE_SLURM_DIR": str(folder),
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "cpq_train",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_NTASKS_PER_NODE": str(num_tasks),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": _free_port(),
    }


def test_slurm(simulated_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = slurm_environment(tmp_path)
    _check(run, _run("scripts/slurm_fit.sbatch", _options(simulated_root, run), **environment))
    assert (tmp_path / "srun.pid").exists()
