"""What a signal does to a process that imports, runs a verb, trains, or stops, and to its children."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpq_train.common import signals
from cpq_train.common.child_processes import follow_parent
from cpq_train.common.signals import (
    SIGNALS,
    Request,
    Stopped,
    exit_code,
    note_signals,
    raise_signals,
    raising_signals,
    received,
    signals_blocked,
)

ALL = sorted(SIGNALS)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def send_and_clean_up(number: int, *while_cleaning: int) -> None:
    try:
        send(number)
    finally:
        send(*while_cleaning)


def train_to_the_end_and_send(number: int) -> None:
    note_signals()
    raise_signals()
    send(number)


def train_and_send(*numbers: int) -> None:
    note_signals()
    send(*numbers)


@pytest.mark.parametrize("number", ALL)
def test_a_verb_is_ended_in_order(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    earlier = [signal.getsignal(one) for one in ALL]
    with pytest.raises(Stopped) as stop, raising_signals():
        send(number)
    assert exit_code(stop.value) == 128 + number
    assert capfd.readouterr().err == f"{number.name}: ended before it was done\n"
    assert [signal.getsignal(one) for one in ALL] == earlier


def test_on_the_way_out_signals_change_nothing() -> None:
    with pytest.raises(Stopped) as stop, raising_signals():
        send_and_clean_up(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert stop.value.request is Request.STOP


def test_training_notes_the_largest_request() -> None:
    with raising_signals():
        note_signals()
        assert received() is Request.NONE
        send(signal.SIGUSR1, signal.SIGTERM)
        assert received() is Request.REQUEUE


@pytest.mark.parametrize(("is_agreed", "num_asked"), [(True, 0), (False, 1)])
def test_who_asks_for_the_job_to_be_requeued(
    is_agreed: bool, num_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0; another rank where it is on its own, and SLURM has not ended it meanwhile."""
    asked: list[str] = []
    monkeypatch.setattr(signals, "_RANK_0_S", 0.0)
    monkeypatch.setattr(signals, "_requeue", lambda: asked.append("asked") or True)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert exit_code(Stopped(Request.REQUEUE, is_agreed=is_agreed)) == 0
    assert len(asked) == num_asked


def test_what_a_process_is_to_ignore_it_ignores() -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with raising_signals():
            send(signal.SIGINT)
            assert received() is Request.NONE
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_first_interrupt_is_noted_whatever_was_before() -> None:
    with raising_signals():
        train_and_send(signal.SIGUSR1, signal.SIGINT)
        assert received() is Request.REQUEUE


def test_behind_training_signals_raise_again() -> None:
    with pytest.raises(Stopped), raising_signals():
        train_to_the_end_and_send(signal.SIGTERM)


def test_a_stop_that_python_drops_at_the_end() -> None:
    with pytest.raises(Stopped), raising_signals():
        Dying()
    time.sleep(0.05)  # in which a forgotten alarm would end the process


def test_a_second_interrupt_ends_training_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with raising_signals():
        train_and_send(signal.SIGINT)
        assert received() is Request.INTERRUPT
    with pytest.raises(Stopped), raising_signals():
        train_and_send(signal.SIGINT, signal.SIGINT)
    assert "Ctrl-C once more" in capfd.readouterr().err


class Dying:
    """Gets a signal while it is deleted, where Python drops all exceptions."""

    def __del__(self) -> None:
        send(signal.SIGTERM)
        time.sleep(0)


def delete_and_go_on() -> None:
    dying = Dying()
    del dying
    time.sleep(20)


def test_a_stop_that_python_drops_is_raised_again(capfd: pytest.CaptureFixture[str]) -> None:
    hook, started_s = sys.unraisablehook, time.monotonic()
    with pytest.raises(Stopped) as stop, raising_signals():
        delete_and_go_on()
    assert stop.value.request is Request.STOP
    assert time.monotonic() - started_s < 10
    assert capfd.readouterr().err == ""
    assert sys.unraisablehook is hook


def test_outside_a_fit_nothing_is_noted() -> None:
    note_signals()
    with pytest.raises(Stopped), raising_signals():
        send(signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "scontrol", "code"),
    [
        ("SIGTERM", "exit 0", 143),
        ("SIGINT", "exit 0", 130),
        ("SIGUSR1", "exit 0", 0),
        ("SIGUSR1", "exit 1", 138),
    ],
)
def test_a_signal_while_importing(number: str, scontrol: str, code: int, tmp_path: Path) -> None:
    """The job has begun nothing: it ends with a line, and is requeued."""
    asked, program = tmp_path / "asked", tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\necho $@ >> {asked}\n{scontrol}\n")
    program.chmod(0o755)
    # Signals itself where the imports of a verb begin: no clock decides what the test sees.
    (tmp_path / "rich.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{number})\n")
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2"}
    environment = {
        **os.environ,
        **job,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tmp_path}:{os.getcwd()}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "cpq_train", "fit"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.startswith(f"{number}: ended before it was done\n")
    assert "Traceback" not in done.stderr
    is_asked = number == "SIGUSR1"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 40_2\n" if is_asked else "")


def test_a_signal_behind_the_work(tmp_path: Path) -> None:
    """The exit code is that of the work, though Python takes its time to end."""
    late = "import atexit, os, signal\nfor name in ('SIGTERM', 'SIGUSR1'):\n"
    late += "    atexit.register(os.kill, os.getpid(), getattr(signal, name))\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    done = subprocess.run([sys.executable, "-m", "cpq_train", "--help"], env=environment, capture_output=True)
    assert done.returncode == 0


def child(ready: Path) -> None:
    follow_parent()
    ready.touch()
    time.sleep(100)


def wait(event: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not event():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def start_child(ready: Path) -> multiprocessing.Process:
    with signals_blocked():
        process = multiprocessing.get_context("fork").Process(target=child, args=(ready,), daemon=True)
        process.start()
    wait(ready.exists)
    return process


def test_a_child_obeys_its_parent_alone(tmp_path: Path) -> None:
    process = start_child(tmp_path / "ready")
    for number in ALL:
        subprocess.run(["/bin/kill", f"-{int(number)}", str(process.pid)], check=True)
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert process.exitcode == 0


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    ready, pid = tmp_path / "ready", tmp_path / "pid"

    def parent() -> None:
        pid.write_text(str(start_child(ready).pid))
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    process.join(20)
    stat = Path(f"/proc/{pid.read_text()}/stat")
    wait(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")
