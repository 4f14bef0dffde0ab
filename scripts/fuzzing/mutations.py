"""What is done to a file: each function changes one, at random, and says what it did.

Numbers that stay plausible are left alone, as no reader can tell them from true ones.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Mutation = Callable[[Path, random.Random], str]

CANARY = "executed"
"""Folder that hostile code makes where it runs."""

NUM_BOMB_BYTES = 1 << 43

HOSTILE_TEXTS = (
    "../../x",
    "/etc/passwd",
    "x\0y",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "=cmd|' /C calc'!A0",
    "[red]x[/x]",
    "\x1b]0;owned\x07\x1b[31m",
    "$\\bad$",
    "a|b\nc",
    "x" * 5000,
)
HOSTILE_VALUES: tuple[Any, ...] = (*HOSTILE_TEXTS, True, [], {}, -1, -1e308, float("nan"), float("inf"))
RAW_VALUES = ("1e400", "-1e400", "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "1" * 5000)
"""As they stand in a text; no value of Python is written so."""


def write(path: Path, data: bytes) -> None:
    """Put another file in the place of one, which may be a link to the original."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ bytes


def flip_bit(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    write(path, bytes(data))
    return f"bit flipped in byte {place}"


def overwrite(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place, length = rng.randrange(len(data)), rng.choice([1, 8, 512, 4096])
    filling = rng.choice([bytes(length), rng.randbytes(length)])
    data[place : place + length] = filling[: len(data) - place]
    write(path, bytes(data))
    return f"{length} bytes overwritten at {place}"


def cut(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    end = rng.choice([0, rng.randrange(len(data)), len(data) - 1])
    write(path, data[:end])
    return f"cut to {end} of {len(data)} bytes"


def repeat_block(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place, length = rng.randrange(len(data)), rng.choice([16, 512, 4096])
    write(path, data[: place + length] + data[place:])
    return f"{length} bytes twice at {place}"


def drop_block(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place, length = rng.randrange(len(data)), rng.choice([1, 16, 512])
    write(path, data[:place] + data[place + length :])
    return f"{length} bytes left out at {place}"


BYTES: Mapping[str, Mutation] = {
    "bit": flip_bit,
    "overwritten": overwrite,
    "cut": cut,
    "repeated": repeat_block,
    "left out": drop_block,
}

# ------------------------------------------------------------------------------- no regular files


def fifo(path: Path, rng: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a FIFO"


def device(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to("/dev/zero")
    return "/dev/zero"


def loop(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.symlink_to(path)
    return "a link to itself"


def folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def missing(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "missing"


IRREGULAR: Mapping[str, Mutation] = {
    "FIFO": fifo,
    "device": device,
    "loop": loop,
    "folder": folder,
    "missing": missing,
}

# ------------------------------------------------------------------------------------------- documents

Place = tuple[Any, Any]
"""A container, and the key or index of a value in it."""


def _places(value: Any) -> list[Place]:
    found: list[Place] = []
    stack = [value]
    while stack:
        one = stack.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            stack += [one[key] for key in keys]
    return found


def set_value(path: Path, rng: random.Random) -> str:
    """Another value somewhere in a JSON document."""
    document = json.loads(path.read_text())
    container, key = rng.choice(_places(document))
    before = container[key]
    raw = rng.choice(RAW_VALUES)
    value = rng.choice([*HOSTILE_VALUES, raw])
    container[key] = "RAW" if value is raw else value
    text = json.dumps(document).replace('"RAW"', raw)
    write(path, text.encode())
    return f"{key!r} {str(before)[:40]!r} became {str(value)[:40]!r}"


def drop_key(path: Path, rng: random.Random) -> str:
    """A key of a JSON document left out."""
    document = json.loads(path.read_text())
    places = [(container, key) for container, key in _places(document) if isinstance(container, dict)]
    container, key = rng.choice(places)
    del container[key]
    write(path, json.dumps(document).encode())
    return f"{key!r} left out"


def say_twice(path: Path, rng: random.Random) -> str:
    """A key of a JSON document said twice, with another value."""
    text = path.read_text()
    places = [place for place, sign in enumerate(text) if sign == "{" and text[place + 1] != "}"]
    place = rng.choice(places)
    key = text[place + 1 :].lstrip().partition(":")[0]
    write(path, f"{text[: place + 1]}{key}: -1, {text[place + 1 :]}".encode())
    return f"{key} twice"


DOCUMENT: Mapping[str, Mutation] = {"value": set_value, "key": drop_key, "twice": say_twice}


def yaml_bomb(path: Path, rng: random.Random) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    deep = "[" * 50_000 + "]" * 50_000
    text = rng.choice(
        ["\n".join(lines), f"a: {deep}", "- " * 20_000 + "x", f"data: {deep}", f"rules: {deep}"]
    )
    write(path, text.encode() + b"\n")
    return f"a bomb of {len(text):,} characters"


YAML_VALUES = ("[]", "{}", "''", "-1", ".nan", ".inf", "1e400", "true", "[[[", "'../../x'", "&a [*a]")


def set_scalar(path: Path, rng: random.Random) -> str:
    """Another value behind a key of a YAML file."""
    lines = path.read_text().splitlines(keepends=True)
    places = [
        number for number, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")
    ]
    number = rng.choice(places)
    key, _, before = lines[number].partition(": ")
    value = rng.choice(
        ["[]", "{}", "''", "-1", ".nan", ".inf", "1e400", "true", "null", "[[[", "'../../x'", "&a [*a]"]
    )
    lines[number] = f"{key}: {value}\n"
    write(path, "".join(lines).encode())
    return f"{key.strip()} {before.strip()[:40]!r} became {value}"


def not_utf8(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    place = rng.randrange(len(data))
    write(path, data[:place] + b"\xff\xfe" + data[place:])
    return f"no UTF-8 at {place}"


YAML: Mapping[str, Mutation] = {"bomb": yaml_bomb, "value": set_scalar, "encoding": not_utf8}


CELLS = ("", "nan", "inf", "-1e400", "x", '"', "=cmd|' /C calc'!A0", "[/x]", "\x1b[31m")


def set_cell(path: Path, rng: random.Random) -> str:
    """Another value in a cell of a CSV table."""
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    cells = lines[number].split(",")
    column = rng.randrange(len(cells))
    cells[column] = rng.choice(
        ["", "nan", "inf", "-1e400", "x", '"', "=cmd|' /C calc'!A0", "[/x]", "\x1b[31m"]
    )
    lines[number] = ",".join(cells)
    write(path, "\n".join([*lines, ""]).encode())
    return f"line {number}, cell {column} became {cells[column]!r}"


CSV: Mapping[str, Mutation] = {"cell": set_cell, "encoding": not_utf8}

# ---------------------------------------------------------------------------------------------- arrays


def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    about = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(about).to_bytes(2, "little") + about


def _extreme(array: Any) -> Any:
    return np.full_like(array, 2**31 - 1) if array.dtype.kind == "i" else np.full(array.shape, -np.inf)


ARRAY_CHANGES: Mapping[str, Callable[[Any], Any]] = {
    "shorter": lambda array: array[: len(array) // 2] if array.ndim else array.reshape(1),
    "of one dimension more": lambda array: array[..., None],
    "of texts": lambda array: np.full(array.shape, "x"),
    "out of range": _extreme,
    "complex": lambda array: np.zeros(array.shape, np.complex64),
}


def change_array(path: Path, rng: random.Random) -> str:
    """An array of an archive of NumPy with another shape, type or content."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    name, change = rng.choice(sorted(arrays)), rng.choice(sorted(ARRAY_CHANGES))
    arrays[name] = ARRAY_CHANGES[change](arrays[name])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write(path, file.getvalue())
    return f"{name} {change}"


def array_bomb(path: Path, rng: random.Random) -> str:
    """An array that says to be of 8 TiB, an object array, or one that expands a thousand times."""
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.choice(["8 TiB", "objects", "1 GiB of zeros"])
    members[name] = {
        "8 TiB": lambda: _header((NUM_BOMB_BYTES // 8,), "<f8"),
        "objects": lambda: _header((1,), "|O") + pickle.dumps([Call(path.parent)]),
        "1 GiB of zeros": lambda: _header((1 << 27,), "<f8") + bytes(1 << 30),
    }[kind]()
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for member, data in members.items():
            file.writestr(member, data)
    return f"{name}: {kind}"


ARRAYS: Mapping[str, Mutation] = {"array": change_array, "array bomb": array_bomb}

# ----------------------------------------------------------------------------------------- checkpoints


class Call:
    """Unpickles as a folder that is made."""

    def __init__(self, place: Path) -> None:
        self.place = str(place / CANARY)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


def code(path: Path, rng: random.Random) -> str:
    """Pickled code somewhere in a checkpoint."""
    content = torch.load(path, weights_only=True)
    call = Call(path.parent)
    content = rng.choice([call, {**content, "x": call}, {**content, "hyper_parameters": call}])
    is_archive = rng.random() < 0.5
    path.unlink()
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    return f"code, archive: {is_archive}"


def set_entry(path: Path, rng: random.Random) -> str:
    """Another value in the place of an entry that no tensor is."""
    content = torch.load(path, weights_only=True)
    places = [(c, k) for c, k in _places(content) if not isinstance(c[k], torch.Tensor | int | float)]
    container, key = rng.choice([place for place in places if isinstance(place[0], dict)])
    value = rng.choice([None, 3.5, "x", [], {}, {"class_path": "evilmod.C"}, [[1]], torch.zeros(2)])
    before, container[key] = container[key], value
    path.unlink()
    torch.save(content, path)
    return f"{key!r} {str(before)[:40]!r} became {str(value)[:40]!r}"


def set_tensor(path: Path, rng: random.Random) -> str:
    """A tensor of another type or shape, or without numbers."""
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict", content.get("model_state", content))
    name = rng.choice([name for name, value in state.items() if torch.is_floating_point(value)])
    tensor = state[name]
    changes: dict[str, Callable[[], Any]] = {
        "bool": lambda: tensor != 0,
        "int": lambda: tensor.to(torch.int32),
        "complex": lambda: tensor.to(torch.complex64),
        "NaN": lambda: torch.full_like(tensor, torch.nan),
        "sparse": lambda: tensor.to_sparse() if tensor.dim() else torch.zeros(3),
        "meta": lambda: tensor.to("meta"),
        "huge": lambda: torch.zeros(1).expand(1 << 40),
        "text": lambda: "x",
        "of one dimension more": lambda: tensor[None],
    }
    change = rng.choice(sorted(changes))
    state[name] = changes[change]()
    path.unlink()
    torch.save(content, path)
    return f"{name} {change}"


def pickle_bomb(path: Path, rng: random.Random) -> str:
    """Values that few bytes stand for."""
    content = torch.load(path, weights_only=True)
    bomb: list[Any] = [1] * 9
    is_deep = rng.random() < 0.5
    for _ in range(300 if is_deep else 30):
        bomb = [bomb] * (1 if is_deep else 9)
    content[rng.choice(["hyper_parameters", "quantization", "data", "x"])] = {"x": bomb}
    path.unlink()
    torch.save(content, path)
    return "values nested deep" if is_deep else "9 to the power of 30 values"


CHECKPOINT: Mapping[str, Mutation] = {
    "code": code,
    "entry": set_entry,
    "tensor": set_tensor,
    "pickle bomb": pickle_bomb,
}
