"""Parsers of a command line whose mistakes are told in a few lines, without the options of the verb."""

from __future__ import annotations

import math
import re
import warnings
from argparse import Action
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_loader
from typing_extensions import override

from cpq_train.common.detection_task import DetectionClass, check_option
from cpq_train.common.documents import parse_yaml, read_text
from cpq_train.common.errors import OptionError, UserError, shown

_WORDS: Final = {"NoneType": "null", "Sequence": "list", "tuple": "list", "bool": "true, false"}
"""Types -> what a person types for them."""

_END_OF_MEMBER: Final = r"(?=\n\s*- |\n\s*Given value|\Z)"
"""Of what jsonargparse says of a member of a union."""


class VerbParser(ArgumentParser):
    """A parser that raises what is wrong, and looks closer at configuration files than jsonargparse does."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong.

        Raises:
            OptionError: Always, but in parsers that jsonargparse tries: there it is an error of its own.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        names = re.match(r"unrecognized arguments: (--[\w.-]+)", message)
        near = _near(names[1], self._option_string_actions) if names else ""
        if self._subcommands_action is not None:  # whose names stand before those of their options
            message = re.sub(r"required: \S.*", lambda named: re.sub(r"\b\w+\.", "", named[0]), message)
        raise OptionError(_in_short(message) + near) from ex

    @override
    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse has it, which leaves files that are no text to whoever reads the traceback."""
        try:
            parsed: Namespace = super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            raise OptionError(
                f"a file of options is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        return parsed

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Look at a configuration file before it is merged with others, while its name is known."""
        where = f"configuration file {str(path)!r}"
        text = read_text(Path(path), "configuration file")
        if text and not text.endswith("\n"):
            warnings.warn(f"{where} ends within a line: look whether it was cut", stacklevel=2)
        content = parse_yaml(text, where)
        if not isinstance(content, Mapping):
            raise OptionError(f"{where}: got {shown(content)}, accepted: a mapping of options")
        names = {action.dest for action in self._actions if not action.dest.endswith(".help")}
        _check_names(content, names, where)
        for action in filter(_is_of_classes, self._actions):
            classes = _at(content, action.dest.split("."))
            if isinstance(classes, Mapping):
                check_option(classes, f"{where}, {action.dest}")
        parsed: Namespace = super().parse_path(path, *args, **kwargs)
        return parsed

    @override
    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        """As argparse has it; and a look at classes, while it is known which of them a value is of."""
        values = super()._get_values(action, arg_strings)
        if _is_of_classes(action) and isinstance(values, str) and values.lstrip().startswith("{"):
            content = parse_yaml(values, f"option {action.dest}")
            if any(isinstance(one, Mapping) for one in content.values()):  # or --data.classes.NAME is one
                check_option(content, action.dest)
        return values

    @override
    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As jsonargparse has it, which takes null for any type, and numbers that are none."""
        super().validate(namespace, *args, **kwargs)
        defaults = self.get_defaults(skip_validation=True)
        for name, value in namespace.items():
            if not _is_finite(value) and value != defaults.get(name):
                raise OptionError(f"{name}: got {shown(value)}, accepted: finite numbers")
            if value is None and defaults.get(name) is not None:
                super().validate(Namespace({name: None}), skip_unset=False, skip_required=True)


def _load(text: str) -> Any:
    """What an option's text stands for; a name with a colon and nothing behind it is that text."""
    value = parse_yaml(text, "option")
    values = list(value.values()) if isinstance(value, dict) else []
    is_name = "\n" not in text.strip() and values == [None] * max(1, len(values))
    return text if is_name else value


set_loader("yaml", _load, exceptions=(UserError,))  # theirs ends the process where a text is nested deep


def _is_of_classes(action: Action) -> bool:
    return getattr(action, "_typehint", None) == dict[str, DetectionClass] | None


def _at(content: Any, keys: Iterable[str]) -> Any:
    """What a file sets an option to; None where it does not, or names another file for it."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _check_names(content: Mapping[Any, Any], names: Collection[str], where: str, above: str = "") -> None:
    """All that a file sets are options, and every section of it holds some."""
    for key, value in content.items():
        name = f"{above}{key}".removesuffix("+")  # which appends to a list
        if not any(one.startswith(f"{name}.") for one in names):
            if name not in names:
                raise OptionError(f"{where}: unknown option {name!r}{_near(name, names)}")
        elif isinstance(value, Mapping):
            _check_names(value, names, where, f"{name}.")
        elif not isinstance(value, str):  # a text names another file
            raise OptionError(f"{where}, {name}: got {shown(value)}, accepted: a mapping of options")


def _near(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=1, cutoff=0.8)
    return f"; is it {near[0]}?" if near else ""


def _in_short(message: str) -> str:
    """What jsonargparse says of a value, which may be a page on the members of a union, in a line."""
    message = re.sub(r"^Subcommand '\w+' does not accept option", "unknown option", message)
    option = re.match(r'Parser key "([^"]+)":\s*', message)
    if option is None:
        return " ".join(message.split())
    text = message[option.end() :]
    seen = re.search(r".*(?:Got value|Given value): (.*)\Z", text, re.DOTALL)
    types = re.search(r"Subtypes: \[(.*)\]$", text, re.MULTILINE) or re.match(
        r"Expected an? (.*)\. Got value", text
    )
    inside = re.search(rf"Problem with given class_path (.*?):\s+(.*?){_END_OF_MEMBER}", text, re.DOTALL)
    if inside is not None:
        return f"{option[1]}: {inside[1]}: {_in_short(inside[2])}"
    if seen is None or types is None:
        first, _, _ = text.partition("\n")
        return f"{option[1]}: {first}"
    return (
        f"{option[1]}: got {shown(None if seen[1] == 'None' else seen[1])}, accepted: {_readable(types[1])}"
    )


def _readable(types: str) -> str:
    """Types as jsonargparse prints them, in words."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    types = re.sub(r"\b(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", types)
    types = re.sub(r"Literal\[([^\]]*)\]", lambda values: values[1].replace("'", ""), types)
    return re.sub(rf"\b({'|'.join(_WORDS)})\b", lambda name: _WORDS[name[1]], types)
