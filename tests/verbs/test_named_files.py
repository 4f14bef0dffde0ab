"""No verb fetches, runs or waits for a file that a command line, a configuration or a checkpoint names."""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import fails
from old_files import CHECKPOINTS, small_options

from cpq_train.verbs.cli import main

URL = "http://127.0.0.1:1/x.ckpt"
TO_LOAD = ("fit", "validate", "test", "predict")


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _code(path: Path) -> None:
    content = torch.load(CHECKPOINTS["float"], weights_only=True)
    torch.save({**content, "x": Call(os.mkdir, str(path.with_name("executed")))}, path)


def _imports(path: Path) -> None:
    """Plain values, which name a class to import."""
    (path.parent / "evilmod.py").write_text(f"import os\nos.mkdir({str(path.with_name('executed'))!r})\n")
    content = torch.load(CHECKPOINTS["float"], weights_only=True)
    content["hyper_parameters"] = {"network": {"class_path": "evilmod.C"}, "_class_path": "evilmod.C"}
    torch.save(content, path)


KINDS: dict[str, Callable[[Path], None]] = {
    "code": _code,
    "imports": _imports,
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "folder": Path.mkdir,
}
SAID = {
    "url": "does not exist",
    "code": "holds pickled code and is refused",
    "imports": "hyper_parameters",
    "FIFO": "is a FIFO, socket or device",
    "device": "is a FIFO, socket or device",
    "loop": "Too many levels of symbolic links",
    "folder": "is a folder",
}


@pytest.fixture(autouse=True)
def is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is run and nothing is connected to."""
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers write to the streams of other tests
    yield
    assert not tried
    assert not (tmp_path / "executed").exists()


def _named(kind: str, folder: Path) -> str:
    """The name of a file of a kind."""
    if kind == "url":
        return URL
    path = folder / "x.ckpt"
    KINDS[kind](path)
    return str(path)


def _options(verb: str, root: Path, folder: Path) -> list[str]:
    more = ["--output", str(folder / "out")] if verb in ("calibrate", "sensitivity") else []
    more += ["--model.scheme", "configs/schemes/int8.yaml"] if more else []
    more += ["--num_samples", "1"] if verb == "sensitivity" else []
    return [verb, *small_options(root, folder / "run"), *more]


def _by_flag(name: str, folder: Path) -> list[str]:
    return ["--ckpt_path", name]


def _by_configuration(name: str, folder: Path) -> list[str]:
    (folder / "c.yaml").write_text(yaml.safe_dump({"ckpt_path": name, "weights_only": False}))
    return ["-c", str(folder / "c.yaml")]


def _inline(name: str, folder: Path) -> list[str]:
    return ["-c", json.dumps({"ckpt_path": name})]


WAYS = (_by_flag, _by_configuration, _inline)


@pytest.mark.parametrize(
    ("verb", "way", "kind"),
    [
        *((verb, way, kind) for verb in TO_LOAD for way in WAYS for kind in ("url", "code", "imports")),
        *(("validate", _by_flag, kind) for kind in ("FIFO", "device", "loop", "folder")),
    ],
)
def test_a_checkpoint_to_load(
    verb: str,
    way: Callable[[str, Path], list[str]],
    kind: str,
    simulated_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*_options(verb, simulated_root, tmp_path), *way(_named(kind, tmp_path), tmp_path)]
    assert SAID[kind] in fails(options, capsys)


@pytest.mark.parametrize(
    ("verb", "name", "kind"),
    [
        *(("validate", "last.ckpt", kind) for kind in KINDS),
        *((verb, "hpc_ckpt_1.ckpt", "code") for verb in TO_LOAD[1:]),
    ],
)
def test_the_files_of_a_run_folder(
    verb: str,
    name: str,
    kind: str,
    simulated_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`last` takes none of these, and no file is taken unasked, in a job of SLURM neither."""
    for variable in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_JOB_ID", "SLURM_JOB_NAME"):
        monkeypatch.setenv(variable, "1")
    folder = tmp_path / "run" if name.startswith("hpc") else tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    KINDS[kind](folder / name)
    options = [*_options(verb, simulated_root, tmp_path), "--ckpt_path", "last"]
    if kind == "imports":  # what it says of itself is checked when it is restored
        options += ["--data.batch_size", "0"]
    assert ("ckpt_path is 'last': no checkpoint in" in fails(options, capsys)) or kind == "imports"


@pytest.mark.parametrize("kind", ["url", "code"])
@pytest.mark.parametrize("verb", [*TO_LOAD, "calibrate", "sensitivity", "profile"])
def test_a_checkpoint_to_start_from(
    verb: str, kind: str, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*_options(verb, simulated_root, tmp_path), "--model.weights", _named(kind, tmp_path)]
    assert SAID[kind] in fails(options, capsys)


@pytest.mark.parametrize("kind", ["url", "code"])
def test_a_teacher(
    kind: str, simulated_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = ["--model.arm", "float_tuned", "--model.weights", str(CHECKPOINTS["float"])]
    teacher = ["--model.distillation.teacher", _named(kind, tmp_path)]
    assert SAID[kind] in fails([*_options("fit", simulated_root, tmp_path), *tuned, *teacher], capsys)


PLAIN = {
    "describe": ["describe", "{}"],
    "verify": ["verify", "{}"],
    "export": ["export", "{}", "--output", "{folder}/x.onnx"],
    "convert": ["convert", "--input", "{}", "--source", "openpcdet", "--output", "{folder}/y.ckpt"],
    "convert --target": ["convert", "--input", "{}", "--target", "openpcdet", "--output", "{folder}/y.pth"],
    "profile": ["profile", "{}"],
}


@pytest.mark.parametrize("kind", [kind for kind in SAID if kind != "imports"])
@pytest.mark.parametrize("verb", PLAIN)
def test_a_checkpoint_of_a_plain_verb(
    verb: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = _named(kind, tmp_path)
    assert SAID[kind] in fails([word.format(name, folder=tmp_path) for word in PLAIN[verb]], capsys)


@pytest.mark.parametrize("verb", ["describe", "export", "verify"])
def test_what_a_checkpoint_names_is_not_imported(verb: str, tmp_path: Path) -> None:
    name = _named("imports", tmp_path)
    with suppress(SystemExit):
        main([word.format(name, folder=tmp_path) for word in PLAIN[verb]])
