"""Reading YAML and JSON files: what is wrong with one is said in a line that names the file and the place."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from cpq_train.common.errors import UserError, shown
from cpq_train.common.files import check_regular

MAX_NODES: Final = 100_000
"""How much a YAML file may hold once its aliases are written out; a config.yaml of a run has some 500."""

SEAL: Final = "crc32"
"""Key of a document's checksum."""

MAX_CHARACTERS: Final = 1_000_000
"""How long a YAML text may be; reading one of this length takes seconds."""

_FLOAT: Final = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; None where it is empty.

    Args:
        path: The file.
        what: What it is, for the message, such as "scheme file".

    Raises:
        UserError: It is missing, unreadable, not UTF-8, no YAML, too large or too deep, or says a key twice.
    """
    return parse_yaml(read_text(path, what), f"{what} {str(path)!r}")


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; `where` names it in the message.

    Raises:
        UserError: See `read_yaml`.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where} has {len(text):,} characters; accepted: up to {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f" line {mark.line + 1}:"
        reason = f"{line} {error.problem or error.context}"
    except RecursionError:
        reason = " it is nested too deep"
    except (yaml.YAMLError, ValueError) as error:
        reason = " " + " ".join(str(error).split())
    raise UserError(f"{where} is no YAML:{reason}")


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; NaN and Infinity are left to whoever checks its numbers and can name them.

    Args:
        path: The file.
        what: What it is, for the message, such as "metrics file".

    Raises:
        UserError: It is missing, unreadable, not UTF-8, no JSON, too deep, or says a key twice.
    """
    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{what} {str(path)!r} is no JSON: {reason}")


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its checksum, by which `unsealed` finds damage that no other check would."""
    rest = {key: value for key, value in document.items() if key != SEAL}
    return {**rest, SEAL: checksum_of(rest)}


def unsealed(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A document without its checksum; one that has none, as older files, is taken as it is.

    Raises:
        UserError: The checksum is another.
    """
    rest = {key: value for key, value in document.items() if key != SEAL}
    if SEAL in document and document[SEAL] != checksum_of(rest):
        accepted = f"as it was written, or, where it was edited on purpose, without {SEAL!r}"
        raise UserError(f"{where} is not what was written: its checksum is another; accepted: {accepted}")
    return rest


def checksum_of(value: Any) -> int:
    """CRC-32 of plain values, whatever the order of keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for `object_pairs_hook`.

    Raises:
        ValueError: A key occurs twice.
    """
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"{shown(key)} occurs twice; accepted: every key once")
        record[key] = value
    return record


def read_text(path: Path, what: str) -> str:
    """What a text file holds; `what` names it in the message.

    Raises:
        UserError: It is missing, no regular file, unreadable, or not UTF-8.
    """
    check_regular(path, what)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: {error.reason} at byte {error.start}"
    except OSError as error:
        reason = f"is not readable: {error.strerror}"
    raise UserError(f"{what} {str(path)!r} {reason}")


class _Loader(yaml.SafeLoader):
    """Floats as YAML 1.2 has them (9.99e1), dates as texts; keys once, aliases within bounds.

    In Python, not C: there a text that is nested too deep ends the process.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _num_nodes(node, {})
        return node


def _num_nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Nodes below a node, those behind aliases every time they are met; 0 in `known` while it is counted."""
    if node in known:
        if not known[node]:
            _refuse("an alias stands for what contains it", node)
        return known[node]
    known[node] = 0
    number = 1
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        number += sum(_num_nodes(one, known) for one in (part if isinstance(part, tuple) else (part,)))
    if number > MAX_NODES:
        _refuse(f"more than {MAX_NODES} entries, aliases written out", node)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    known[node] = number
    return number


def _check_keys(node: yaml.MappingNode) -> None:
    met: set[tuple[str, str]] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if (key.tag, key.value) in met:
            _refuse(f"key {key.value!r} occurs twice", key)
        met.add((key.tag, key.value))


def _refuse(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_CHANGED: Final = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
