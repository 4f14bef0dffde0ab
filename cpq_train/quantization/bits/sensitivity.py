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
from typing import Annotated, Any, Final, TypeAlias

from pydantic import Field, TypeAdapter
from torch import nn

from cpq_train.common.documents import sealed, unsealed
from cpq_train.common.errors import UserError
from cpq_train.common.files import append_whole, check_regular, write_whole
from cpq_train.common.progress import track
from cpq_train.common.schema import keys, validated
from cpq_train.quantization.bits.bit_plan import Unit
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import only_quantized

Scores: TypeAlias = dict[str, float]
Prepare: TypeAlias = Callable[[Scheme], tuple[nn.Module, Callable[[], Scores]]]
"""Scheme -> the calibrated network, and what scores it as it is switched."""


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

    @property
    def labels(self) -> dict[str, Any]:
        """What it is called in the results."""
        return {"option": self.option, "mode": self.mode, "unit": self.unit}

    def key(self, context: Mapping[str, Any]) -> str:
        """Hash of all that the scores depend on; names of schemes and units are not among it."""
        scheme = {**self.scheme.to_dict(), "name": ""}
        depends_on = {**context, "scheme": scheme, "quantized": sorted(self.quantized)}
        return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def cases_of(scheme: Scheme, option: str, units: Collection[Unit]) -> list[Case]:
    """What is measured of a uniform scheme: nothing and all of it, each unit alone and left out."""
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
        if path.exists():
            check_regular(path, "measurements")
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            record = _measurement(line, f"{path}, line {number}: no measurement")
            self._by_key[record["key"]] = record
        if whole != content:
            write_whole(path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._by_key[key]

    def append(self, record: dict[str, Any]) -> None:
        """Keep a measurement, which holds its own `key`."""
        append_whole(self._path, json.dumps(sealed(record)) + "\n")
        self._by_key[record["key"]] = record


_Score = Annotated[float, Field(strict=True)]
"""Infinite where nothing is quantized."""
_KIND: Final = TypeAdapter(keys({"key": str, "scores": dict[str, _Score]}))


def _measurement(line: bytes, where: str) -> dict[str, Any]:
    """What a line says.

    Raises:
        UserError: It is no measurement.
    """
    try:
        record: dict[str, Any] = json.loads(line)
        validated(_KIND, record, where)
        return unsealed(record, where)
    except (UserError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{where}: {error}"
        raise UserError(f"{reason}; delete the line or the file") from error


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
        # By key: where there is one unit, it alone and all of them are the same.
        missing = {case.key(context): case for case in group if case.key(context) not in log}
        if missing:
            network, score = prepare(scheme)
            for key, case in track(missing.items(), f"Measuring {scheme.name}"):
                with only_quantized(network, case.quantized):
                    log.append({"key": key, **case.labels, "scores": score()})
    return [{**case.labels, **log[case.key(context)]["scores"]} for case in cases]


def alone(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Unit -> option -> loss of the network with that unit alone quantized."""
    losses: dict[str, dict[str, float]] = {}
    for record in records:
        if record["mode"] == "alone":
            losses.setdefault(record["unit"], {})[record["option"]] = max(record["loss"], 0.0)
    return losses
