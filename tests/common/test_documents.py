"""YAML and JSON files: what they hold, and the one line that says why they are none."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpq_train.common.documents import parse_yaml, read_json, read_yaml, sealed, unsealed
from cpq_train.common.errors import UserError
from cpq_train.quantization.scheme import Scheme


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9.99e1", 99.9),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.2.3", "1.2.3"),
        ("12", 12),
        ("[on, off]", [True, False]),
        ("2026-02-31", "2026-02-31"),
        ("", None),
        (
            "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a}",
            {"b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}},
        ),
    ],
)
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text, "text")
    if isinstance(found, dict):
        del found["a"]
    assert found == value
    assert type(found) is type(value)


def test_the_loader_of_others_is_as_it_was() -> None:
    assert yaml.safe_load("9.99e1") == "9.99e1"


LISTS = "a0: &a0 [1, 1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x: 1\na: [", r"f\.yaml' is no YAML: line 2: expected the node content"),
        ("x: 1\ny: 1\nx: 2", r"line 3: key 'x' occurs twice"),
        ("a:\n  - {b: 1, 'b': 2}", r"line 2: key 'b' occurs twice"),
        ("a: !!python/object:os.system b", r"line 1: could not determine a constructor"),
        ("? [a]\n: 1", r"line 1: found unhashable key"),
        ("a: &a [*a]", r"line 1: an alias stands for what contains it"),
        (LISTS, r"line \d+: more than 100000 entries, aliases written out"),
        (MERGES, r"line \d+: more than 100000 entries, aliases written out"),
        ("[" * 100_000, r"is no YAML: it is nested too deep"),
        ("9" * 5000, r"is no YAML: Exceeds the limit"),
        (b"a: \x00", r"is no YAML: unacceptable character"),
        (b"a: \xff", r"f\.yaml' is not UTF-8 text: invalid start byte at byte 3"),
    ],
    ids=range(12),
)
def test_no_yaml(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_yaml(file, "scheme file")
    assert str(error.value).startswith(f"scheme file '{file}' is no")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON: Expecting property name .* line 1 column 2"),
        ('{"a": 1, "a": 2}', "is no JSON: 'a' occurs twice"),
        ("[" * 100_000, "is no JSON: it is nested too deep"),
        (b'"\xff"', "is not UTF-8 text: invalid start byte at byte 1"),
    ],
    ids=range(4),
)
def test_no_json(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"metrics file '.*f\.json' {message}"):
        read_json(file, "metrics file")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scheme file '.*none' does not exist"):
        read_yaml(tmp_path / "none", "scheme file")
    with pytest.raises(UserError, match=r"sidecar '.*' is a folder: expected a file"):
        read_json(tmp_path, "sidecar")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sidecar '.*' does not exist"):
        read_json(tmp_path / "file/below", "sidecar")


def test_a_key_that_occurs_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    text = ", ".join(f'"{number}": 0' for number in [*range(200_000), 199_999])
    (tmp_path / "x.json").write_text(f"{{{text}}}")
    began_s = time.process_time()
    with pytest.raises(UserError, match="'199999' occurs twice"):
        read_json(tmp_path / "x.json", "file")
    assert time.process_time() - began_s < 20


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "1" + ":1" * 5000])
def test_a_whole_number_of_thousands_of_digits(number: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"name: {number}\n")
    with pytest.raises(UserError, match="name: got a number of thousands of digits, accepted: a text"):
        Scheme.from_file(tmp_path / "s.yaml")


def test_documents_are_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for read in (read_json, read_yaml):
        with pytest.raises(UserError, match=r"file '.*' is a FIFO, socket or device: expected a file"):
            read(tmp_path / "x.json", "file")


def test_a_seal_finds_what_types_do_not() -> None:
    document = {"b": [1.5, None, "é"], "a": {"x": 1}}
    written = json.loads(json.dumps(sealed(document)))
    assert unsealed(written, "it") == document
    assert sealed(written) == written
    assert unsealed(document, "it") == document  # as older files are
    with pytest.raises(UserError, match="it is not what was written: its checksum is another"):
        unsealed({**written, "a": {"x": 2}}, "it")
