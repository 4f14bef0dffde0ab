"""One fit at a time in a run folder.

A fit claims its folder by a file that says who it is; the file's time is its heartbeat. Nothing here locks:
not every file system of a cluster has working locks, but all create a file once and rename in one go.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpq_train.common.errors import UserError
from cpq_train.common.files import cannot_write, check_writable

CLAIM_FILE = "claim.json"

BEAT_S = 30.0
"""Between two heartbeats."""

STALE_S = 10 * BEAT_S
"""Without a heartbeat, after which a claim counts no more."""

Claimant = dict[str, str | int]


class Claim:
    """A folder that is this process's as long as it beats.

    Args:
        file: The claim.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ours = this_process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Claim the folder.

        Raises:
            UserError: A fit that may still run has it.
        """
        while not self._created():
            found, age_s = _read(self._file), _age_s(self._file)
            if not self._yields(found, age_s):
                raise UserError(_in_use(self._file, found, age_s))
            self._clear_away(found)
        self._thread.start()

    def check(self) -> None:
        """See that the folder is still this process's.

        Raises:
            UserError: Another fit has taken it, as it may where this one did not beat for `STALE_S`.
        """
        with suppress(OSError):  # where it cannot be read now, the checkpoint will say what is wrong
            self._check_is_ours()

    def _check_is_ours(self) -> None:
        found = _read(self._file)
        if found != self._ours:
            now = "nobody" if found is None else _named(found)
            raise UserError(
                f"run folder {str(self._file.parent)!r} was this fit's and is now claimed by {now}: it ends, "
                "and leaves the folder as it is"
            )

    def release(self) -> None:
        """Give the folder back."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # a claim that stays yields to the next fit, as this process is dead then
            if _read(self._file) == self._ours:
                self._file.unlink(missing_ok=True)

    def _created(self) -> bool:
        try:
            file = self._file.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(self._ours, file)
                file.flush()
                os.fsync(file.fileno())  # a job that comes back after a crash of its node has to know its own
        except OSError as error:
            self._file.unlink(missing_ok=True)
            raise UserError(cannot_write(self._file, None, error)) from error
        return True

    def _yields(self, found: Claimant | None, age_s: float) -> bool:
        if found is None:
            return age_s > STALE_S
        if _is_here(found):
            return _is_dead(found) or age_s > STALE_S
        return age_s > STALE_S or found["job"] == self._ours["job"] != ""

    def _clear_away(self, judged: Claimant | None) -> None:
        """Remove the claim that was judged, and not one that another fit has put in its place meanwhile."""
        aside = self._file.with_name(f"{CLAIM_FILE}.{os.getpid()}")
        with suppress(FileNotFoundError):
            self._file.rename(aside)
            if _read(aside) == judged:
                aside.unlink()
            else:
                aside.rename(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # a disk that does not answer for a while is no reason to end
                if _read(self._file) == self._ours:
                    os.utime(self._file)


@contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Have a run folder inside, which is made where it is not there, and give it back behind.

    Raises:
        UserError: A fit that may still run has it, or nothing can be written there.
    """
    check_writable(folder, "trainer.default_root_dir")
    folder.mkdir(parents=True, exist_ok=True)
    claim = Claim(folder / CLAIM_FILE)
    claim.take()
    try:
        yield claim
    finally:
        claim.release()


def this_process() -> Claimant:
    """What tells this process from others: a process id by itself comes again, and is another's elsewhere."""
    return {
        "host": socket.gethostname(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }


def _is_here(found: Claimant) -> bool:
    return (found["host"], found["pid_namespace"]) == (socket.gethostname(), _pid_namespace())


def _is_dead(found: Claimant) -> bool:
    return found["started"] != _started(int(found["pid"]))


def _pid_namespace() -> str:
    """Containers may share a host's name and not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _read(file: Path) -> Claimant | None:
    """Who has claimed; None where nobody has, or it cannot be told, as while the file is written."""
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= this_process().keys() else None


def _age_s(file: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system and not of this machine."""
    probe = file.with_name(f"{CLAIM_FILE}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _in_use(file: Path, found: Claimant | None, age_s: float) -> str:
    return (
        f"trainer.default_root_dir {str(file.parent)!r} is in use by a fit, {_named(found)}, whose last "
        f"heartbeat was {age_s:.0f} s ago; accepted: another folder, or this one when that fit has ended or "
        f"been silent for {STALE_S:g} s"
    )


def _named(found: Claimant | None) -> str:
    if found is None:
        return "which does not say what it is"
    job = f"SLURM job {found['job']}, " if found["job"] else ""
    return f"{job}process {found['pid']} on {found['host']}"
