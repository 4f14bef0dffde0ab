"""Two fits in one folder: the second one is told, unless the first is known to be dead."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails
from tiny_model import BASE, tiny_options

from cpq_train.common.errors import UserError
from cpq_train.resilience import claim
from cpq_train.resilience.claim import CLAIM_FILE, STALE_S, claimed, this_process
from cpq_train.verbs.mistakes import naming_mistakes


def leave(folder: Path, age_s: float = 0.0, **other: str | int) -> Path:
    """The claim of another fit."""
    folder.mkdir(exist_ok=True)
    file = folder / CLAIM_FILE
    file.write_text(json.dumps({**this_process(), **other}))
    now_s = file.stat().st_mtime
    os.utime(file, (now_s - age_s, now_s - age_s))
    return file


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_fit_has_its_folder_and_gives_it_back(tmp_path: Path) -> None:
    run = tmp_path / "new/run"
    with claimed(run):
        said = json.loads((run / CLAIM_FILE).read_text())
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid())
        with (
            pytest.raises(UserError, match=rf"in use by a fit, process {os.getpid()} on .*another folder"),
            claimed(run),
        ):
            pass
    assert not list(run.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere", "job": ""},  # a process id says nothing of another machine
        {"pid_namespace": "pid:[1]", "pid": 2, "job": ""},
        {"host": "elsewhere", "job": "7"},
        {"job": "8"},  # the same job, and alive here
        {"host": "elsewhere", "added": "by a later release", "job": ""},
    ],
)
def test_another_fit_that_may_live_has_it(
    other: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    file = leave(tmp_path, STALE_S - 20, **other)
    before = file.read_text()
    with pytest.raises(UserError, match=r"last heartbeat was 28\d s ago"), claimed(tmp_path):
        pass
    assert file.read_text() == before
    assert [one.name for one in tmp_path.iterdir()] == [CLAIM_FILE]


@pytest.mark.parametrize("why", ["same job", "dead", "another life of the same id", "silent", "torn"])
def test_a_claim_that_yields(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    file = leave(
        tmp_path,
        *([STALE_S + 20] if why in ("silent", "torn") else []),
        **{
            "same job": {"host": "elsewhere", "job": "8"},
            "dead": {"pid": dead_pid(), "job": ""},
            "another life of the same id": {"started": "1", "job": ""},
            "silent": {"host": "elsewhere", "job": "7"},
            "torn": {},
        }[why],
    )
    if why == "torn":
        os.truncate(file, 8)
        now_s = file.stat().st_mtime
        with pytest.raises(UserError, match="which does not say what it is"), claimed(tmp_path):
            pass
        os.utime(file, (now_s - STALE_S - 20, now_s - STALE_S - 20))
    with claimed(tmp_path):
        assert json.loads(file.read_text()) == this_process()
        assert [one.name for one in tmp_path.iterdir()] == [CLAIM_FILE]


@pytest.mark.parametrize("now", ["another", "nobody"])
def test_who_is_taken_over_ends(now: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood still, another fit took its folder, and perhaps is done already: what that one left stays."""
    monkeypatch.setattr(claim, "BEAT_S", 0.01)
    file = tmp_path / CLAIM_FILE
    with claimed(tmp_path) as ours:
        beaten_s = file.stat().st_mtime
        while file.stat().st_mtime == beaten_s:
            ours.check()
        leave(tmp_path, host="elsewhere") if now == "another" else file.unlink()
        by = r"process \d+ on elsewhere" if now == "another" else "nobody"
        with pytest.raises(UserError, match=f"was this fit's and is now claimed by {by}: it ends"):
            ours.check()
    assert file.exists() == (now == "another")


def test_a_full_disk_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"claim\.json': [\d,]+ bytes are free \(No space left"),
        naming_mistakes(),
        claimed(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_the_second_fit_is_told(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    leave(run, host="elsewhere")
    said = fails(["fit", "-c", BASE, *tiny_options(simulated_root, run)], capsys)
    assert f"trainer.default_root_dir '{run}' is in use by a fit, process {os.getpid()} on elsewhere" in said
    assert [one.name for one in run.iterdir()] == [CLAIM_FILE]


def test_a_folder_that_cannot_be_one(
    simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    run = tmp_path / "file/run"
    said = fails(["fit", "-c", BASE, *tiny_options(simulated_root, run)], capsys)
    assert f"trainer.default_root_dir '{run}': '{tmp_path}/file' is no folder; accepted" in said
