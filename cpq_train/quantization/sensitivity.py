"""What each part of a network loses to quantization: one unit quantized at a time, and left out at a time.

Nothing here knows the network: how a scheme becomes a network, and how that is scored, is handed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from rich.progress import track
from torch import nn

from cpq_train.errors import UserError
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import only_quantized

FLOAT = "float"
"""The option of a unit that is not quantized."""

Scores: TypeAlias = dict[str, float]
Prepare: TypeAlias = Callable[[Scheme], tuple[nn.Module, Callable[[], Scores]]]
"""Scheme -> the calibrated network, and what scores it as it is switched."""


@dataclass(frozen=True)
class Option:
    """A choice of bits; None for the inputs keeps those of the scheme."""

    weight_bits: int
    input_bits: int | None = None

    @property
    def name(self) -> str:
        """`W4`, or `W4A8` where the inputs are chosen too."""
        return f"W{self.weight_bits}" + ("" if self.input_bits is None else f"A{self.input_bits}")

    def rule(self, layers: str) -> dict[str, Any]:
        """The rule of a scheme that gives these bits to what is quantized of `layers`."""
        inputs = {} if self.input_bits is None else {"input": {"bits": self.input_bits}}
        return {"layers": layers, "weight": {"bits": self.weight_bits}, **inputs}


@dataclass(frozen=True)
class Unit:
    """Layers that get the same option: a single layer, or those of the module `name`."""

    name: str
    layers: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """The glob of a scheme's rule."""
        return self.name if self.layers == (self.name,) else f"{self.name}.*"


def uniform_scheme(base: Scheme, option: Option) -> dict[str, Any]:
    """`base` with the option's bits wherever it quantizes, as the content of a scheme file."""
    return _extended(base, option.name, [option.rule("*")])


def mixed_scheme(
    base: Scheme, units: Iterable[Unit], options: Iterable[Option], assignment: Mapping[str, str]
) -> dict[str, Any]:
    """`base` with each unit's assigned option, as the content of a scheme file."""
    by_name = {option.name: option for option in options}
    rules = []
    for unit in units:
        option = by_name.get(assignment[unit.name])
        off = {"layers": unit.pattern, "weight": "off", "input": "off"}
        rules.append(off if option is None else option.rule(unit.pattern))
    return _extended(base, "mixed", rules)


def _extended(base: Scheme, suffix: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    content = base.to_dict()
    return {**content, "name": f"{base.name}_{suffix}", "rules": [*content["rules"], *rules]}


@dataclass(frozen=True)
class Case:
    """One measurement: a network quantized as `scheme` says, in the layers `quantized` only.

    Args:
        scheme: Of the network.
        option: Name of what the scheme stands for.
        mode: `alone` and `left_out` are about `unit`; `all`, `none` about the whole network.
        unit: Name of the unit, None for the whole network.
        quantized: Names of the layers that are switched on.
    """

    scheme: Scheme
    option: str
    mode: str
    unit: str | None
    quantized: tuple[str, ...]

    def key(self, context: Mapping[str, Any]) -> str:
        """Hash of all that the scores depend on; names of schemes and units are not among it."""
        scheme = {**self.scheme.to_dict(), "name": ""}
        depends_on = {**context, "scheme": scheme, "quantized": sorted(self.quantized)}
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def cases_of(scheme: Scheme, option: str, units: Collection[Unit]) -> list[Case]:
    """Everything that is measured of a uniform scheme: nothing and all of it, each unit alone and left out."""
    everything = tuple(layer for unit in units for layer in unit.layers)
    cases = [Case(scheme, option, "none", None, ()), Case(scheme, option, "all", None, everything)]
    for unit in units:
        others = tuple(layer for layer in everything if layer not in unit.layers)
        cases.append(Case(scheme, option, "alone", unit.name, unit.layers))
        cases.append(Case(scheme, option, "left_out", unit.name, others))
    return cases


class MeasurementLog:
    """Measurements by key, kept as JSON lines that are appended as they are made.

    A last line that an interrupted run left incomplete is dropped.

    Args:
        path: The file; its folder exists.

    Raises:
        UserError: Another line is no measurement.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._by_key[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: no measurement; delete the line or the file") from error
        if whole != content:
            path.write_bytes(whole)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._by_key[key]

    def append(self, record: dict[str, Any]) -> None:
        """Keep a measurement, which holds its own `key`."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._by_key[record["key"]] = record


def measure(
    cases: Iterable[Case], prepare: Prepare, log: MeasurementLog, context: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Score every case, those in the log aside.

    Args:
        cases: Those of one scheme follow one another: its network is built once, if any of them is missing.
        prepare: Builds, calibrates and scores.
        log: Takes each measurement as it is made.
        context: What the scores depend on beside scheme and switches; plain values.

    Returns:
        A record for each case, in order: option, mode, unit and the scores.
    """
    cases = list(cases)
    for scheme, group in groupby(cases, key=lambda case: case.scheme):
        missing = [case for case in group if case.key(context) not in log]
        if missing:
            network, score = prepare(scheme)
            for case in track(missing, f"Measuring {scheme.name}"):
                with only_quantized(network, case.quantized):
                    scores = score()
                named = {"option": case.option, "mode": case.mode, "unit": case.unit}
                log.append({"key": case.key(context), **named, **scores})
    return [log[case.key(context)] for case in cases]
