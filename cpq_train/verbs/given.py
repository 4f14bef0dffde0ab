"""The options that a command line and its configuration files set; all others have their defaults.

jsonargparse tells them by itself (`parse_args(defaults=False)`), but not where the source of a link has its
default: then it refuses to parse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpq_train.common.documents import parse_yaml, read_yaml
from cpq_train.common.errors import UserError

CONFIG_ENDINGS = (".yaml", ".yml", ".json")


class Given:
    """What was given, and where.

    Args:
        args: The command line.
        files: Its configuration files, in their order.
    """

    def __init__(self, args: Sequence[str], files: Sequence[Path]) -> None:
        self._options = dict(_options(args))
        self._names: set[str] = set()
        self._said: list[tuple[Path, str, Any]] = []
        self._places: dict[str, int] = {}
        for place, file in enumerate(files):
            self._take("", _content(str(file)), file, place)
        for name, value in self._options.items():
            self._take(name, value, Path(), len(files))

    def _take(self, name: str, value: Any, file: Path, place: int) -> None:
        """Note single options: a group of which one is set is not set as a whole."""
        content = value if isinstance(value, Mapping) else _content(value)
        if isinstance(content, Mapping):
            inner = file if isinstance(value, Mapping) or not _is_file(value) else Path(value)
            for key, one in content.items():
                self._take(f"{name}.{key}".lstrip("."), one, inner, place)
        else:
            self._names.add(name)
            self._places[name.removesuffix("+")] = place
        self._said.append((file, name, value))

    def __contains__(self, name: str) -> bool:
        """Whether an option is set, in full or by an abbreviation of its last part."""
        ends = (name[len(one) :] for one in self._options if "." in one and name.startswith(one))
        return name in self._names or any("." not in end for end in ends)

    def on_command_line(self, name: str) -> bool:
        """Whether the command line itself sets an option."""
        return any(name.startswith(option) for option in self._options)

    def place_of(self, name: str) -> int:
        """The last place that sets an option by its full name: a file by its number, then the command line.

        It is -1 where none does.
        """
        return self._places.get(name, -1)

    def file_that_says(self, name: str, value: Any) -> Path | None:
        """The last configuration file in which an option has a value."""
        files = (file for file, one, said in reversed(self._said) if one == name and said == value)
        return next((file for file in files if file != Path()), None)


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if arg.startswith("--") and len(arg) > 2:
            name, is_joined, value = arg[2:].partition("=")
            yield name, value if is_joined else following


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(CONFIG_ENDINGS) and Path(value).is_file()


def _content(value: Any) -> Any:
    """What a configuration file, or a text in braces, holds; the value itself where it is neither."""
    if _is_file(value):
        return read_yaml(Path(value), "configuration file") or {}
    if isinstance(value, str) and value.startswith("{"):
        with suppress(UserError):
            return parse_yaml(value, "option")
    return value
