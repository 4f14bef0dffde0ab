"""Sixty damaged and hostile files, each read by a command; and the fuzzer sees what it looks for."""

import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_are_found() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def test_a_file_of_each_kind(tmp_path: Path) -> None:
    from fuzz import BAD, fuzz
    from fuzzing.subjects import SUBJECTS
    from fuzzing.workspace import build

    build(tmp_path / "workspace")
    cases = fuzz(tmp_path / "workspace", tmp_path / "cases", seed=0, num=20)
    assert {case.kind for case in cases} == set(SUBJECTS)
    assert [case for case in cases if case.ending in BAD] == []


def _opens_elsewhere(arguments: list[str]) -> None:
    Path(arguments[0]).write_text("x")


def _renames_elsewhere(arguments: list[str]) -> None:
    Path("here").write_text("x")
    Path("here").rename(arguments[0])


def _removes_elsewhere(arguments: list[str]) -> None:
    shutil.rmtree(arguments[0], ignore_errors=True)


def _connects(arguments: list[str]) -> None:
    socket.create_connection(("127.0.0.1", 1))


def _starts(arguments: list[str]) -> None:
    os.system("true")


def _imports(arguments: list[str]) -> None:
    __import__("evilmod")


def _makes_the_canary(arguments: list[str]) -> None:
    Path("executed").mkdir()


def _raises(arguments: list[str]) -> None:
    raise KeyError("x")


def _waits(arguments: list[str]) -> None:
    time.sleep(60)


def _takes_memory(arguments: list[str]) -> None:
    bytearray(1 << 35)


def _refuses(arguments: list[str]) -> None:
    print("error: no good", file=sys.stderr)
    sys.exit(2)


def _says_nothing(arguments: list[str]) -> None:
    sys.exit(2)


def _prints_a_command(arguments: list[str]) -> None:
    print("\x1b]0;owned\x07")


def _finds_the_same(arguments: list[str]) -> None:
    Path("result").write_text("whole")


def _finds_something_else(arguments: list[str]) -> None:
    Path("result").write_text("other")


@pytest.mark.parametrize(
    ("main", "ending"),
    [
        (_opens_elsewhere, "outside"),
        (_renames_elsewhere, "outside"),
        (_removes_elsewhere, "outside"),
        (_connects, "executed"),
        (_starts, "executed"),
        (_imports, "executed"),
        (_makes_the_canary, "executed"),
        (_raises, "traceback"),
        (_takes_memory, "traceback"),
        (_says_nothing, "traceback"),
        (_waits, "hang"),
        (_refuses, "refused"),
        (_prints_a_command, "unescaped"),
        (_finds_the_same, "same"),
        (_finds_something_else, "changed"),
    ],
)
def test_what_the_fuzzer_sees(
    main: Callable[[list[str]], None], ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fuzz import class_of
    from fuzzing import running
    from fuzzing.subjects import Reader

    def result(folder: Path, said: str) -> Any:
        return (folder / "result").read_text()

    monkeypatch.setattr(running, "main", main)
    monkeypatch.setattr(running, "TIMEOUT_S", 3.0)
    place = tmp_path / "case"
    place.mkdir()
    reader = Reader([str(tmp_path / "elsewhere")], result)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = running.run(reader.arguments, place, tmp_path / "log")
    assert class_of(ended, reader, place, "whole") == ending


@pytest.mark.parametrize("way", ["changed", "removed", "added", "a link"])
def test_files_that_belong_to_no_reader(way: str, tmp_path: Path) -> None:
    from fuzzing.workspace import OUTSIDE, outside

    letter = tmp_path / OUTSIDE / "documents" / "letter"
    letter.parent.mkdir(parents=True)
    letter.write_text("of the user")
    before = outside(tmp_path)
    assert outside(tmp_path) == before
    if way == "changed":
        letter.write_text("of another")
    elif way == "added":
        letter.with_name("another").touch()
    else:
        letter.unlink()
    if way == "a link":
        letter.symlink_to("/dev/null")
    assert outside(tmp_path) != before
