"""Names of files that are made from data: tokens, scene names, names of runs."""

from __future__ import annotations

import hashlib
import re

MAX_BYTES = 230
"""Of a file name: most file systems have 255, and one that is being written has an ending more."""

_FOREIGN = re.compile(r"[^A-Za-z0-9._-]")
_HASH_DIGITS = 20
_HASHED = re.compile(rf"-[0-9a-f]{{{_HASH_DIGITS}}}\Z")


def file_name(name: str, suffix: str = "") -> str:
    """A name as that of a file: letters, digits, `.`, `_` and `-`, no dot in front, `MAX_BYTES` at most.

    A name that is one already stays as it is. Another gets a hash of itself behind what is left of it, so
    that different names are different files.

    Args:
        name: what the file is called after.
        suffix: what follows, such as `.png`.
    """
    room = MAX_BYTES - len(suffix)
    kept = _FOREIGN.sub("_", name).lstrip(".")
    if kept == name and 0 < len(name) <= room and not _HASHED.search(name):
        return f"{name}{suffix}"
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{kept[: room - _HASH_DIGITS - 1]}-{digest}{suffix}"
