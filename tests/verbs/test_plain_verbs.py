"""The verbs without a trainer: options are the parameters of a function, texts its docstring's."""

import inspect
import json
import os
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


HEAVY = (
    *("torch", "lightning", "torchmetrics", "spconv", "pytorch_quantization"),
    *("matplotlib", "scipy", "nuscenes", "onnx", "onnxruntime", "wandb"),
)
STARTS = """
import contextlib, io, json, sys
from cpq_train.verbs.cli import main
found = []
for arguments in {commands!r}:
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said):
        main(arguments)
    found.append([said.getvalue(), sorted(set({heavy!r}) & sys.modules.keys())])
json.dump(found, sys.stderr)
"""


def _starts(commands: list[list[str]], cwd: Path) -> list[tuple[str, list[str]]]:
    """What command lines say, one after the other in a process, and what is imported by then."""
    code = STARTS.format(commands=commands, heavy=HEAVY)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
    return [(said, imported) for said, imported in json.loads(done.stderr)]


def test_starts_without_heavy_libraries(tmp_path: Path) -> None:
    verbs = [*cli.PLAIN_VERBS.keys() - {"record"}]
    assert dict(zip(verbs, _starts([[verb, "--help"] for verb in verbs], tmp_path), strict=True)) == {
        verb: ("", []) for verb in verbs
    }


MISTAKES = {
    "describe no.ckpt": "checkpoint 'no.ckpt' does not exist",
    "verify no.ckpt": "checkpoint 'no.ckpt' does not exist",
    "verify no.ckpt --num_samples 0": "num_samples is 0",
    "export no.ckpt --output net.onnx": "checkpoint 'no.ckpt' does not exist",
    "export no.ckpt --output net.pt": "expected a file that ends in .onnx",
    "export no.ckpt --output net.onnx --target engine": "target: got 'engine'",
    "export no.ckpt --output net.onnx --target tensorrt --with_runtime": "--with_runtime with target",
    "convert --input no.pth --output a.ckpt": "source is None, target is None",
    "convert --input no.pth --output a.ckpt --source openpcdet": "checkpoint 'no.pth' does not exist",
    "convert --input no.pth --output a.ckpt --source openpcdet --config no.yaml": "'no.yaml' does not exist",
    "build-gt-database --root nowhere --num_sweeps 0": "num_sweeps is 0",
    "simulate --output data --num_scenes 0": "num_scenes is 0",
}
"""Command line -> what is wrong with it."""


def test_mistakes_are_told_before_heavy_imports(tmp_path: Path) -> None:
    found = _starts([command.split() for command in MISTAKES], tmp_path)
    for (command, text), (said, imported) in zip(MISTAKES.items(), found, strict=True):
        assert text in said, command
        assert not imported, command


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
