"""A real SLURM on this machine, where somebody asks for it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    "CPQ_SLURM_CHECK" not in os.environ,
    reason="installs and runs a SLURM on this machine, as root, for ten minutes: set CPQ_SLURM_CHECK=1",
)
def test_nothing_is_lost_under_a_real_slurm() -> None:
    done = subprocess.run(
        ["bash", "scripts/slurm_check.sh"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_does_not_start_where_a_slurm_is() -> None:
    environment = {**os.environ, "SLURM_CONF": "/etc/slurm/slurm.conf"}
    done = subprocess.run(["bash", "scripts/slurm_check.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "accepted: a machine without a SLURM of its own" in done.stderr
