"""Real processes that are killed, stopped, starved and hung."""

import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest_failure import (
    Options,
    State,
    assert_equal,
    ranks,
    start,
    step_of,
    wait_for,
    wait_for_end,
    weights,
)

from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.cli import main

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "fit",
    "SLURM_NTASKS": "{num_ranks}",
    "SLURM_NTASKS_PER_NODE": "{num_ranks}",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "{rank}",
    "SLURM_LOCALID": "{rank}",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "{rank}",
    "LOCAL_RANK": "{rank}",
    "WORLD_SIZE": "{num_ranks}",
    "LOCAL_WORLD_SIZE": "{num_ranks}",
    "GROUP_RANK": "0",
}
TWO_RANKS = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")


@pytest.fixture(scope="module")
def undisturbed(fit_options: Options, tmp_path_factory: pytest.TempPathFactory) -> State:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    main(fit_options(run))
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 12  # the last validation's, though its score was no better
    return weights(run)


def test_killed_twice(undisturbed: State, fit_options: Options, tmp_path: Path) -> None:
    options, log = fit_options(tmp_path / "run"), tmp_path / "log"
    for step in torch.randint(1, 12, (2,)).sort().values.tolist():
        process = start(options, log)
        wait_for(lambda step=step: step_of(tmp_path / "run") >= step, process)
        process.kill()
        assert wait_for_end(process) == [-signal.SIGKILL]
    assert wait_for_end(start(options, log)) == [0]
    assert_equal(undisturbed, weights(tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_every_process(
    number: signal.Signals, undisturbed: State, fit_options: Options, tmp_path: Path
) -> None:
    """As SLURM and a terminal send it: loading processes take no notice, and the run is saved."""
    options, log = fit_options(tmp_path / "run", "--resume.every_n_steps", "1000"), tmp_path / "log"
    process = start([*options, "--data.num_workers", "2"], log)
    wait_for(lambda: (tmp_path / "run/metrics.csv").exists(), process)  # the loop of steps has begun
    workers = children(process)
    assert len(workers) == 2
    for pid in (*workers, process.pid):
        assert pid is not None
        os.kill(pid, number)
    assert wait_for_end(process) == [128 + number]
    saved = step_of(tmp_path / "run")
    assert saved >= 0
    assert f"{number.name}: saved at step {saved} in" in log.read_text()
    assert "--ckpt_path last" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not any(map(is_alive, workers))
    assert wait_for_end(start(options, log)) == [0]
    assert_equal(undisturbed, weights(tmp_path / "run"))


def children(process: BaseProcess) -> list[int]:
    """The processes that one has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and that nobody has asked about does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_two_ranks_are_requeued(
    fit_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM signals one of the tasks: all save together, the job is requeued once, and goes on.

    A rank that is killed then ends the other, which says why, and the job goes on once more.
    """
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/scontrol.log\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")

    def job(run: str) -> list:
        options = fit_options(tmp_path / run, *TWO_RANKS)
        return [start(options, tmp_path / f"{run}.log", rank) for rank in ranks(SLURM)]

    assert wait_for_end(*job("whole")) == [0, 0]
    first = job("requeued")
    wait_for(lambda: step_of(tmp_path / "requeued") >= 1, first[0])
    os.kill(first[1].pid, signal.SIGUSR1)
    assert wait_for_end(*first) == [0, 0]
    assert (tmp_path / "scontrol.log").read_text().splitlines() == ["requeue 4242"]
    assert step_of(tmp_path / "requeued") < 6
    started_s = run_started_s(tmp_path / "requeued/checkpoints/resume.ckpt")
    second = job("requeued")
    wait_for(lambda: step_of(tmp_path / "requeued") >= 4, second[0])
    second[1].kill()
    assert wait_for_end(*second) == [2, -signal.SIGKILL]
    assert "another rank of this run ended" in (tmp_path / "requeued.log").read_text()
    assert wait_for_end(*job("requeued")) == [0, 0]
    assert run_started_s(tmp_path / "requeued/checkpoints/last.ckpt") == started_s
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "requeued"))


def run_started_s(file: Path) -> float:
    """When the run began that a checkpoint belongs to."""
    started_s: float = torch.load(file, weights_only=True)["resume"]["run_started_s"]
    return started_s


def test_a_full_disk(fit_options: Options, tmp_path: Path) -> None:
    """The limit on a file's size fails a write halfway, as a full disk does."""
    options, log, run = fit_options(tmp_path / "run"), tmp_path / "log", tmp_path / "run"
    first = start(options, log)
    wait_for(lambda: step_of(run) >= 1, first)
    first.kill()
    first.join()
    # Killed between two renames, it leaves only the one before.
    size = next((run / "checkpoints").glob("resume*.ckpt")).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        full = start(options, log)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert wait_for_end(full) == [2]
    said = log.read_text()
    assert "cannot write" in said
    assert "bytes are free" in said
    assert "resume-previous.ckpt' stays" in said
    assert not list((run / "checkpoints").glob("*.partial"))
    assert torch.load(run / "checkpoints/resume-previous.ckpt", weights_only=True)["global_step"] >= 1


def test_a_dead_worker(fit_options: Options, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(fit_options(tmp_path / "run", "--data.num_workers", "1"), log)
    wait_for(lambda: step_of(tmp_path / "run") >= 1, process)
    workers = children(process)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert wait_for_end(process) == [2]
    assert "a process that loads data died" in log.read_text()
    assert "data.num_workers" in log.read_text()


def test_a_hung_rank(fit_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that hangs and the one that waits for it both end, and say where they were."""
    step = CenterPointDetector.training_step

    def hanging(self: CenterPointDetector, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            time.sleep(1000)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CenterPointDetector, "training_step", hanging)
    options = fit_options(tmp_path / "run", *TWO_RANKS, "--watchdog.timeout_s", "8")
    both = [start(options, tmp_path / f"log{number}", rank) for number, rank in enumerate(ranks(TORCHRUN))]
    codes = wait_for_end(*both)
    assert codes[1] == 1
    assert codes[0] not in (0, None)
    assert "in hanging" in (tmp_path / "log1").read_text()


def test_a_stopped_rank_leaves_no_orphan(fit_options: Options, tmp_path: Path) -> None:
    """Rank 1 stands still and cannot even watch itself; rank 0, its parent, ends and takes it along."""
    options = fit_options(tmp_path / "run", *TWO_RANKS, "--watchdog.timeout_s", "15")
    with (tmp_path / "log").open("wb") as log:
        parent = subprocess.Popen([sys.executable, "-m", "cpq_train", *options], stdout=log, stderr=log)
    try:
        end_s = time.monotonic() + 180
        while step_of(tmp_path / "run") < 1:
            assert parent.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.05)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGSTOP)
        assert parent.wait(120) != 0
        time.sleep(1)
        assert not is_alive(int(child))
    finally:
        parent.kill()
