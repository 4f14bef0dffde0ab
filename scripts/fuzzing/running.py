"""A reader in a process of its own, with bounds on memory and time, and what it ended like."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cpq_train.verbs.cli import main

MEMORY_BYTES = 3 << 30
"""What a reader may take beyond what the process has when it is forked."""

TIMEOUT_S = 60.0

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTS = (
    *("import", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"),
    *("socket.connect", "socket.getaddrinfo"),
)

CHANGED = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"), (0,)),
    "shutil.rmtree": (0,),  # it removes by names that are relative to a descriptor
    **dict.fromkeys(("os.symlink", "os.link"), (1,)),
    "os.rename": (0, 1),
}
"""Which arguments of these events are places that change."""

HARMLESS = ("/dev/", "/proc/", "/sys/")
"""Where a write goes that leaves nothing."""


class Ending(NamedTuple):
    """How a reader ended.

    Attributes:
        code: Of the process; None where it was killed at its time's end.
        said: Its output.
        seconds: How long it took.
    """

    code: int | None
    said: str
    seconds: float


def run(arguments: list[str], folder: Path, log: Path, timeout_s: float | None = None) -> Ending:
    """The command line in a forked process that may write to a folder only.

    Args:
        arguments: Its words.
        folder: Working directory, and the only place for its files.
        log: Where its output goes; violations are lines that begin with `VIOLATION`.
        timeout_s: When it is killed; None is `TIMEOUT_S`.
    """
    began_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: main(arguments), folder, log)
    code = _wait(pid, began_s + (timeout_s or TIMEOUT_S))
    said = log.read_text(errors="replace") if log.is_file() else ""
    return Ending(code, said, time.monotonic() - began_s)


def _wait(pid: int, end_s: float) -> int | None:
    while time.monotonic() < end_s:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _in_child(work: Callable[[], Any], folder: Path, log: Path) -> None:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace")
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        tempfile.tempdir = str(folder)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
        sys.addaudithook(_Watch(folder, descriptor))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # as the interpreter would show it
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


class _Watch:
    """An audit hook that reports what no reader of a file should do."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._allowed = (f"{folder.resolve()}/", *HARMLESS)
        self._descriptor = descriptor

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS and (event != "import" or str(args[0]).startswith("evilmod")):
            self._report(event, args)
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES and isinstance(args[0], str):
            self._check(event, args[0])
        for place in CHANGED.get(event, ()):
            if isinstance(args[place], str | bytes | os.PathLike):
                self._check(event, os.fsdecode(args[place]))

    def _check(self, event: str, path: str) -> None:
        name = os.path.abspath(path)
        place = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if path and not f"{place}/".startswith(self._allowed):
            self._report(event, (path,))

    def _report(self, event: str, args: tuple[Any, ...]) -> None:
        os.write(self._descriptor, f"\nVIOLATION {event} {args[:2]!r}\n".encode())
