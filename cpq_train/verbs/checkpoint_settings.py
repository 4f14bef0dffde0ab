"""What a command leaves to the checkpoint and to the configuration files that it names.

`given` is what the command line and its configuration files say, `config` is that with all defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from cpq_train.common.checkpoint import read_plain
from cpq_train.data.settings import DataSettings

DECIDED_BY_STRUCTURE = ("network", "arm", "scheme", "batchnorm", "ranges")
"""Settings of the model that a run cannot change when it is resumed: `training.resuming` compares them."""


def keep_what_was_asked(config: Namespace, given: Namespace) -> None:
    """Have a fit compared with the checkpoint that it resumes: Lightning lets that one's settings win."""
    for name in DECIDED_BY_STRUCTURE:
        if name in given.get("model", {}):
            config.model.update(given.model[name], name)


def find_scheme(config: Namespace) -> None:
    """Look for a scheme file that is not there beside the configuration that names it, too."""
    scheme = config.model.scheme
    if scheme is None or Path(scheme).is_file():
        return
    for file in reversed(config.get("config") or []):
        beside = Path(str(file)).parent / scheme
        if _scheme_named_in(Path(str(file))) == scheme and beside.is_file():
            config.model.scheme = str(beside)
            return


def _scheme_named_in(file: Path) -> Any:
    content = yaml.safe_load(file.read_text())
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("scheme") if isinstance(model, dict) else None


def take_data_settings(config: Namespace, given: Namespace) -> Iterator[str]:
    """Let the data be as they were for the checkpoint, where nothing else is given.

    Yields:
        A sentence for each thing that a person should know: settings that differ, or that nobody states.
    """
    path = _checkpoint_of(config)
    if path is None:
        return
    content = read_plain(path, mmap=True)
    stated = DataSettings.of(content, path) if isinstance(content, dict) else None
    if stated is None:
        yield from _assumed(path, config, given)
        return
    for name, value in stated.to_dict().items():
        if name not in given.get("data", {}):
            config.data[name] = value
        elif tuple_of(config.data[name]) != tuple_of(value):
            yield f"data.{name} is {config.data[name]}; checkpoint {str(path)!r} was made with {value}"


def _checkpoint_of(config: Namespace) -> Path | None:
    named = [config.get("ckpt_path"), config.model.weights]
    return next((Path(name) for name in named if name is not None and Path(name).is_file()), None)


def _assumed(path: Path, config: Namespace, given: Namespace) -> Iterator[str]:
    names = [name for name in DataSettings().to_dict() if name not in given.get("data", {})]
    if names:
        taken = ", ".join(f"data.{name} {config.data[name]}" for name in names)
        yield f"checkpoint {str(path)!r} does not say with what data settings it was made: taking {taken}"


def tuple_of(value: Any) -> Any:
    """A list as a tuple: a configuration and a checkpoint differ in that."""
    return tuple(value) if isinstance(value, list) else value
