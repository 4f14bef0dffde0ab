"""Schema numbers of the files that are written here; `docs/formats.md` is the policy.

A number goes up where an older reader would misread the file, not where something is only added.
"""

from __future__ import annotations

from typing import Any

from cpq_train.common.errors import UserError


def check_schema(found: Any, newest: int, what: str) -> None:
    """Refuse a file that this release cannot read.

    Args:
        found: Its schema number, None where it says none.
        newest: The one that is written here; all from 1 to it are read.
        what: The file, for the message.

    Raises:
        UserError: The number is none of those.
    """
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= newest:
        is_newer = isinstance(found, int) and found > newest
        why = ": a newer cpq_train wrote it, read it with that one" if is_newer else ""
        accepted = "1" if newest == 1 else f"1 to {newest}"
        raise UserError(f"{what}: schema is {found!r}; accepted: {accepted}{why}")
