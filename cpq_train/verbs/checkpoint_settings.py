"""What a command leaves to the checkpoint and to the configuration files that it names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.data.settings import DataSettings

DECIDED_BY_STRUCTURE = ("network", "arm", "scheme", "batchnorm", "ranges")
"""Settings of the model that a run cannot change when it is resumed: `training.resuming` compares them."""

GRID = ("voxel_size", "point_cloud_range")
"""Settings that the data have from `model.network`."""


class Given:
    """The options that a command line and its configuration files set; all others have their defaults.

    Args:
        args: The command line.
        files: Its configuration files, in their order.
    """

    def __init__(self, args: Iterable[str], files: Sequence[Path]) -> None:
        self._contents = {file: yaml.safe_load(file.read_text()) or {} for file in files}
        options = (arg[2:].partition("=")[0] for arg in args if arg.startswith("--"))
        self._names = {*options, *(name for content in self._contents.values() for name in _names(content))}

    def __contains__(self, name: str) -> bool:
        """Whether an option is set, or a group that it belongs to, or a part of it."""
        return any(f"{n}.".startswith(f"{name}.") or f"{name}.".startswith(f"{n}.") for n in self._names)

    def file_that_says(self, group: str, name: str, value: Any) -> Path | None:
        """The last configuration file in which an option of a group has a value."""
        for file, content in reversed(self._contents.items()):
            options = content.get(group)
            if isinstance(options, Mapping) and options.get(name) == value:
                return file
        return None


def _names(content: Mapping[str, Any], group: str = "") -> Iterator[str]:
    """Dotted names of single options: a group of which one is set is not set as a whole."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{group}{key}.")
        else:
            yield f"{group}{key}"


def keep_what_was_asked(config: Namespace, asked: Namespace, given: Given) -> None:
    """Have a fit compared with the checkpoint that it resumes: Lightning lets that one's settings win."""
    for name in DECIDED_BY_STRUCTURE:
        if f"model.{name}" in given and asked.model[name] is not None:
            config.model[name] = asked.model[name]


def find_scheme(config: Namespace, given: Given) -> None:
    """Look for a scheme file that is not there beside the configuration that names it, too."""
    scheme = config.model.scheme
    if scheme is None or Path(scheme).is_file():
        return
    file = given.file_that_says("model", "scheme", scheme)
    if file is not None and (file.parent / scheme).is_file():
        config.model.scheme = str(file.parent / scheme)


def take_data_settings(config: Namespace, given: Given) -> Iterator[str]:
    """Let the data be as they were for the checkpoint, where nothing else is given.

    Yields:
        A sentence for each thing that a person should know: settings that differ, or that nobody states.
    """
    path = _checkpoint_of(config)
    if path is None:
        return
    stated = DataSettings.of(read_checkpoint(path), path)
    if stated is None:
        yield from _assumed(path, config, given)
        return
    for name, value in stated.to_dict().items():
        if name not in GRID and f"data.{name}" not in given:
            config.data[name] = value
        elif as_tuple(config.data[name]) != as_tuple(value):
            yield f"data.{name} is {config.data[name]}; checkpoint {str(path)!r} was made with {value}"


def _checkpoint_of(config: Namespace) -> Path | None:
    named = [config.get("ckpt_path"), config.model.weights]
    return next((Path(name) for name in named if name is not None and Path(name).is_file()), None)


def _assumed(path: Path, config: Namespace, given: Given) -> Iterator[str]:
    names = [name for name in DataSettings().to_dict() if name not in GRID and f"data.{name}" not in given]
    if names:
        taken = ", ".join(f"data.{name} {config.data[name]}" for name in names)
        yield f"checkpoint {str(path)!r} does not say with what data settings it was made: taking {taken}"


def as_tuple(value: Any) -> Any:
    """A list as a tuple: a configuration and a checkpoint differ in that."""
    return tuple(value) if isinstance(value, list) else value
