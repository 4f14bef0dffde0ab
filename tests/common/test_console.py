"""What is printed is text: no markup, no command to the terminal."""

import logging
import subprocess
import sys
import warnings

import pytest
from rich.table import Table

from cpq_train.common import progress
from cpq_train.common.console import plain_messages, print_plain
from cpq_train.verbs.cli import main

NAMES = {
    "[red]x": "[red]x",
    "[/x]": "[/x]",
    "[link=http://x]y[/link]": "[link=http://x]y[/link]",
    ":smile:": ":smile:",
    "\x1b[2Jx": "\\x1b[2Jx",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31m": "\\x9b31m",
    "a\u202eb": "a\\u202eb",
    "not UTF-8 \udcff": "not UTF-8 \\udcff",
}


@pytest.mark.parametrize("name", NAMES)
def test_sentences(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_plain(f"a {name} b")
    print_plain(f"a {name} b", style="red", stderr=True)
    assert capsys.readouterr() == (f"a {NAMES[name]} b\n",) * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("colours", [None, "1"])
def test_tables(
    name: str, colours: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if colours:
        monkeypatch.setenv("FORCE_COLOR", colours)
        monkeypatch.setenv("COLUMNS", "180")
    table = Table(title=f"title {name}", caption=f"caption {name}")
    table.add_column(f"column {name}", footer=name)
    table.add_row(f"cell {name}")
    print_plain(table)
    printed = capsys.readouterr().out
    for place in ("title", "caption", "column", "cell"):
        assert f"{place} {NAMES[name]}" in printed
    assert "\x1b]" not in printed
    assert "\x1b[2J" not in printed


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "draws_bars", lambda: is_terminal)
    monkeypatch.setattr(progress, "EVERY_N_SECONDS", 0.0)
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.0,))
    list(progress.track([1, 2], "[/x]\x1b[2J"))
    printed = capsys.readouterr()
    assert "[/x]\\x1b[2J" in (printed.out if is_terminal else printed.err)


def test_error_messages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["\x1b[31m[/x]"])
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert "[/x]" in said


SAYING = """
import logging, warnings
from cpq_train.common.console import plain_messages
with plain_messages():
    warnings.warn("a \\x1b[31m name")
    logging.getLogger("x").warning("of %s", "\\x1b]0;x\\x07")
"""


def test_warnings_and_logs() -> None:
    said = subprocess.run([sys.executable, "-c", SAYING], capture_output=True, text=True, check=True).stderr
    assert "a \\x1b[31m name" in said
    assert "of \\x1b]0;x\\x07" in said
    assert "\x1b" not in said


def test_messages_are_as_before_afterwards() -> None:
    before = warnings.formatwarning, logging.getLogRecordFactory()
    with plain_messages():
        pass
    assert before == (warnings.formatwarning, logging.getLogRecordFactory())
