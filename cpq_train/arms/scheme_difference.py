"""Two schemes told apart, setting by setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cpq_train.arms.description import with_kinds_of_today
from cpq_train.quantization.scheme import Scheme


def scheme_difference(asked: Scheme, of_checkpoint: Scheme, calibration: Mapping[str, Any] | None) -> str:
    """The settings in which a scheme differs from that of a checkpoint, a line each, and what to do about it.

    Empty where it differs in none.

    What the two are called does not count, nor do the layers that calibration left in float as asked.

    Args:
        asked: The scheme of `model.scheme`.
        of_checkpoint: That of the checkpoint.
        calibration: How the checkpoint says its ranges were found.
    """
    asked, of_checkpoint = with_kinds_of_today(asked), with_kinds_of_today(of_checkpoint)
    if asked.on_unfit_range == "float":
        asked = asked.with_float((calibration or {}).get("left_in_float", ()))
    if replace(asked, name="") == replace(of_checkpoint, name=""):
        return ""
    mine, theirs = _settings(asked.to_dict()), _settings(of_checkpoint.to_dict())
    lines = [
        f"  {key}: checkpoint {theirs.get(key, 'none')}, model.scheme {mine.get(key, 'none')}"
        for key in {**theirs, **mine}
        if mine.get(key) != theirs.get(key) and key != "name"
    ]
    return "\n".join([*lines, "  to go on as the checkpoint is: --model.scheme null"])


def _settings(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value of every single setting; rules are numbered from 1."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        children = [(str(i), entry) for i, entry in enumerate(value, 1)]
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, child in children:
        found |= _settings(child, f"{name}.{key}".lstrip("."))
    return found
