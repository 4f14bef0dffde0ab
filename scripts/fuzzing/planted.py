"""What the data root of a stranger may hold beside its tables: caches that lie, links that lead elsewhere."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuzzing.mutations import Mutation, write
from fuzzing.workspace import OUTSIDE

DTYPES = ("|O", "garbage", "|S0", "|S999999999", "<f3", ">f8", "<f16", "<i8", "<u4", "|i1", "f8,f8", "", None)


def forged(path: Path, rng: random.Random) -> str:
    """Another type or shape of a column, and a checksum that fits."""
    document = path.parent / "contents.json"
    contents = json.loads(document.read_text())["contents"]
    name = rng.choice(sorted(contents["columns"]))
    column = contents["columns"][name]
    shape = column["shape"]
    changes: dict[str, Any] = {
        "dtype": rng.choice(DTYPES),
        "shape": rng.choice([[], [0], [1 << 62], [1 << 70], [-1], [*shape, 1], [shape[0] // 2, *shape[1:]]]),
        "crc32": None if column["crc32"] is not None else 0,
    }
    keys = rng.choice([["dtype"], ["shape"], ["crc32"], ["dtype", "shape"]])
    column.update({key: changes[key] for key in keys})
    crc32 = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
    write(document, json.dumps({"crc32": crc32, "contents": contents}).encode())
    return f"{name} said to be { ({key: changes[key] for key in keys}) }"


def linked_home(path: Path, rng: random.Random) -> str:
    """A folder of the user in the place of one that holds caches, which is moved there or away."""
    place = rng.choice([path.parent, path.parents[1], path.parents[2]])
    outside = _outside(path)
    if rng.random() < 0.5:
        outside = outside / place.name
        place.rename(outside)
    else:
        place.rename(outside.with_name("away"))
    place.symlink_to(outside)
    return f"{place.name} a link to {outside.name}"


def linked_lock(path: Path, rng: random.Random) -> str:
    """A remnant whose lock is a file of the user."""
    remnant = path.parents[1] / f".unfinished-{rng.choice(['a', path.parent.name])}-b"
    lock = _outside(path) / "letter"
    if rng.random() < 0.5:
        remnant.symlink_to(lock.parent)
    else:
        remnant.mkdir()
        (remnant / ".lock").symlink_to(lock)
    path.unlink()  # so that one is written anew
    return f"{remnant.name} with a lock elsewhere"


def _outside(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / OUTSIDE).is_dir()) / OUTSIDE


PLANTED: Mapping[str, Mutation] = {"forged": forged, "home": linked_home, "lock": linked_lock}
