"""How far a loop has come: bars on a terminal, lines in a log, on a clock of the test's own."""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

from cpq_train.common import progress as progress_module
from cpq_train.common.progress import draws_bars, progress, track

TIME = "2025-05-28 14:03:12"


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def loop(self, num_items: int, seconds: float) -> Iterator[int]:
        """Items that take so long each."""
        for item in range(num_items):
            self.now_s += seconds
            yield item


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    fake = SimpleNamespace(monotonic=lambda: clock.now_s, strftime=lambda _: TIME)
    monkeypatch.setattr(progress_module, "time", fake)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def test_a_line_every_so_often(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    items = list(track(clock.loop(200, 0.5), "Calibrating", 200))
    assert items == list(range(200))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{TIME} Calibrating: 60 of 200, 30 %, 2 per s, 0:01:10 left",
        f"{TIME} Calibrating: 120 of 200, 60 %, 2 per s, 0:00:40 left",
        f"{TIME} Calibrating: 180 of 200, 90 %, 2 per s, 0:00:10 left",
        f"{TIME} Calibrating: 200 in 0:01:40",
    ]


def test_short_and_unnamed_loops_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(clock.loop(29, 1), "Drawing")) == list(range(29))
    assert list(track(clock.loop(100, 60), None)) == list(range(100))
    assert capsys.readouterr() == ("", "")


def test_a_loop_of_unknown_length(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    list(track(clock.loop(2, 4000), "Reading"))
    assert capsys.readouterr().err.splitlines() == [
        f"{TIME} Reading: 1, 0.00025 per s",
        f"{TIME} Reading: 2, 0.00025 per s",
        f"{TIME} Reading: 2 in 2:13:20",
    ]


def test_amounts_that_are_no_items(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Indexing (MB)", 640) as advance:
        clock.now_s = 31
        advance(312.4)
    assert f"{TIME} Indexing (MB): 312 of 640, 49 %, 10.1 per s, 0:00:33 left\n" in capsys.readouterr().err


def test_a_loop_that_is_broken_off_says_no_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for item in track(clock.loop(10, 30), "Measuring", 10):
        if item == 2:
            break
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"{TIME} Measuring: 1 of 10",
        f"{TIME} Measuring: 2 of 10",
    ]


def test_a_bar_on_a_terminal(clock: Clock, terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    with redirect_stdout(terminal):
        list(track(clock.loop(3, 60), "Simulating", 3))
    assert "Simulating" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert capsys.readouterr().err == ""


def test_an_exception_leaves_the_terminal_clean(terminal: Terminal) -> None:
    def stop() -> None:
        for _ in track([1, 2, 3], "Simulating"):
            raise KeyboardInterrupt

    with redirect_stdout(terminal), pytest.raises(KeyboardInterrupt):
        stop()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().count(hide) == terminal.getvalue().count(show) == 1


def test_where_a_bar_is_drawn(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    with redirect_stdout(terminal):
        assert draws_bars()
        monkeypatch.setenv("TERM", "dumb")
        assert not draws_bars()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with redirect_stdout(io.StringIO()):
        assert not draws_bars()
