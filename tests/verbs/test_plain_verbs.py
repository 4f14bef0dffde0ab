"""The verbs without a trainer: options are the parameters of a function, texts its docstring's."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cpq_train.verbs import cli
from cpq_train.verbs.cli import PLAIN_VERBS, Verb, main


def _exit_code(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return exit_.value.code


@pytest.mark.parametrize("name", PLAIN_VERBS)
def test_help_lists_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb = PLAIN_VERBS[name]
    function = getattr(import_module(verb.module), verb.function)
    assert _exit_code([name, "--help"]) == 0
    usage, texts = capsys.readouterr().out.split("\noptions:\n")
    parameters = list(inspect.signature(function).parameters)
    for parameter in parameters:
        assert (
            (f"\n  {parameter} " in usage) if parameter == verb.positional else (f"  --{parameter} " in texts)
        )
    assert ("YAML file with these options" in texts) == ("config" not in parameters)


@pytest.mark.parametrize("name", ["compare", "score", "simulate"])
def test_starts_without_torch(name: str) -> None:
    code = (
        "import sys, contextlib\nfrom cpq_train.verbs.cli import main\n"
        f"with contextlib.suppress(SystemExit): main([{name!r}, '--help'])\n"
        "sys.exit(len({'torch', 'lightning'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def _record(
    folders: list[Path],
    output: Path,
    cloud: list[Path] | None = None,
    number: int = 1,
    name: str | None = None,
) -> None:
    """Record what is given.

    Args:
        folders: Given without a name.
        output: Has to be given.
        cloud: A list.
        number: A number.
        name: A text.
    """
    given.append((folders, output, cloud, number, name))


given: list[Any] = []


@pytest.fixture(autouse=True)
def _a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    given.clear()
    monkeypatch.setitem(cli.PLAIN_VERBS, "record", Verb(__name__, "_record", "folders"))


def test_lists_without_brackets() -> None:
    main(["record", "1", "b c", "--output", "2", "--cloud", "x", "3", "--number", "4", "--name", "5"])
    main(["record", "--output=o", "a", "--cloud", "x", "--cloud", "y", "z"])
    main(["record", "--output=o", "a"])
    assert given == [
        ([Path("1"), Path("b c")], Path("2"), [Path("x"), Path("3")], 4, "5"),
        ([Path("a")], Path("o"), [Path("x"), Path("y"), Path("z")], 1, None),
        ([Path("a")], Path("o"), None, 1, None),
    ]


def test_options_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("output: o\nnumber: 3\n")
    main(["record", "a", "--config", str(tmp_path / "options.yaml"), "--number", "4"])
    assert given == [([Path("a")], Path("o"), None, 4, None)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: folders, output"),
        (["a"], "required: output"),
        (["a", "--output", "o", "--number", "x"], "error: number: got 'x', accepted: int\n"),
        (["a", "--output", "o", "--cloud"], "--cloud: expected at least one argument"),
        (["a", "--output", "o", "--surprise", "1"], "unrecognized arguments: --surprise 1\n"),
        (["a", "--output", "o", "--numbr", "1"], "unrecognized arguments: --numbr 1; is it --number?\n"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(["record", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.endswith("\npython -m cpq_train record --help lists the options\n")
    assert error.count("\n") == 2
    assert not given
