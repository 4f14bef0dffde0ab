"""What a checkpoint says of its network: the `quantization` entry, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import NotRequired

from cpq_train.common.arm_names import Arm
from cpq_train.common.errors import UserError
from cpq_train.common.schema import Count, CountAboveZero, Flag, check_schema, keys, mapping_to, validated
from cpq_train.quantization.batchnorm import BatchNormPolicy
from cpq_train.quantization.prepared import Prepared
from cpq_train.quantization.ranges.policy import AmaxPolicy
from cpq_train.quantization.scheme import KINDS, QuantizerScheme, Scheme
from cpq_train.quantization.wiring import RESIDUAL, Wiring

SCHEMA = 2
KINDS_WRITTEN_AS_ALL = ("SubMConv3d", "SparseConv3d", "Conv2d", "ConvTranspose2d", "ResidualAdd")
"""What the first releases, which had no others, wrote for a rule without `kinds`."""

CHANGES_OF_WEIGHTS = ("bias_correction", "adaround_num_steps")
"""Entries of `calibration` that say, where they are not 0, that weights are no longer the float ones."""

_Quantizer = keys(
    {
        "format": str,
        "bits": CountAboveZero,
        "signed": Flag,
        "narrow_range": Flag,
        "axis": Count | None,
        "method": str,
        "mode": Literal["static", "dynamic", "off"],
        "amax": AmaxPolicy,
    }
)
_Layer = keys(
    {
        "kind": str,
        "arithmetic": str,
        "weight": _Quantizer,
        "input": _Quantizer,
        "shares_input_with": str | None,
        # Old files lack these.
        "bias": NotRequired[str],
        "why_float": NotRequired[str],
        "why_simulated": NotRequired[str],
    }
)
_Wiring = keys(
    {
        "one_tensor": list[list[str]],
        "folds": dict[str, str],
        "unfolded": dict[str, str],
        "never_called": list[str],
        "reused": dict[str, list[float]],
    }
)
_ENTRY: TypeAdapter[dict[str, Any]] = TypeAdapter(
    keys(
        {
            "arm": Arm,
            "scheme": dict[str, Any] | None,
            "batchnorm": BatchNormPolicy,
            "layers": mapping_to(_Layer),
            "calibration": dict[str, Any] | None,
            "parents": dict[str, str],
            "trained_on": NotRequired[dict[str, str]],
            "network": NotRequired[str],
            # Files of schema 1 lack it.
            "wiring": NotRequired[_Wiring | None],
        }
    )
)


@dataclass(kw_only=True)
class Description:
    """The `quantization` entry of a checkpoint, without its rows of layers.

    Attributes:
        arm: Which arm it is.
        scheme: How it is quantized, None where it is not.
        batchnorm: What became of its BatchNorm.
        amax: What became of its ranges in training.
        calibration: How its ranges were found, None where none were.
        parents: Arm -> SHA-256 of the checkpoints it came from; `teacher` -> that of the one it learned from.
        trained_on: Fingerprint of a data set -> the splits, joined by "+", where it or one that it came from
            was trained on samples that it was to be scored on.
        wiring: How its layers are connected; None of a float arm, which does not depend on it.
        network_class: Name of its class where it is no CenterPoint.
        kinds: Layer that can be quantized -> its kind, as a file has them.
        groups_of_schema_1: Layers that share a quantizer, in a file of that schema, which has no wiring.
    """

    arm: Arm
    scheme: Scheme | None = None
    batchnorm: BatchNormPolicy = "folded"
    amax: AmaxPolicy = "frozen"
    calibration: dict[str, Any] | None = None
    parents: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    wiring: Wiring | None = None
    network_class: str | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    groups_of_schema_1: tuple[tuple[str, ...], ...] = ()

    @staticmethod
    def of(checkpoint: Mapping[str, Any], path: str | Path) -> Description:
        """Read what a checkpoint says.

        Args:
            checkpoint: Its content.
            path: For messages.

        Raises:
            UserError: It says nothing of itself, is of a newer schema, or lacks an entry.
        """
        where = f"checkpoint {str(path)!r}"
        entry = checkpoint.get("quantization")
        if not isinstance(entry, Mapping):
            raise UserError(f"{where} does not say what it is (no 'quantization')")
        check_schema(entry.get("schema"), SCHEMA, f"{where}, quantization")
        validated(_ENTRY, entry, f"{where}, quantization")
        return Description(
            arm=entry["arm"],
            scheme=None if entry["scheme"] is None else _scheme(entry["scheme"], entry["schema"], where),
            batchnorm=entry["batchnorm"],
            amax=_amax_policy(entry["layers"]),
            calibration=entry["calibration"],
            parents=dict(entry["parents"]),
            trained_on=dict(entry.get("trained_on", {})),
            wiring=None if entry.get("wiring") is None else Wiring.from_dict(entry["wiring"]),
            network_class=entry.get("network"),
            kinds={name: row["kind"] for name, row in entry["layers"].items()},
            groups_of_schema_1=_groups(entry["layers"]) if entry.get("wiring") is None else (),
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """What it says of how the network came about."""
        return {
            "calibration": self.calibration,
            "parents": dict(self.parents),
            "trained_on": dict(self.trained_on),
        }

    def check_centerpoint(self, path: str | Path) -> None:
        """Refuse a checkpoint of another network.

        Raises:
            UserError: It is of one.
        """
        if self.network_class is not None:
            raise UserError(
                f"checkpoint {str(path)!r} is of another network than CenterPoint ({self.network_class}): "
                "cpq_train.load(path, network) takes it, with the float network that it was prepared from"
            )

    def entry(self, prepared: Prepared) -> dict[str, Any]:
        """The `quantization` entry of the checkpoint (plain values only).

        Args:
            prepared: What `prepare` or `unquantized` returned.
        """
        return {
            "schema": SCHEMA,
            "arm": self.arm,
            "scheme": None if self.scheme is None else self.scheme.to_dict(),
            "batchnorm": self.batchnorm,
            "layers": _layers(prepared, self.amax),
            "calibration": None if self.calibration is None else dict(self.calibration),
            "parents": dict(self.parents),
            "wiring": None if self.wiring is None else self.wiring.to_dict(),
            **({"trained_on": dict(self.trained_on)} if self.trained_on else {}),
            **({"network": self.network_class} if self.network_class else {}),
        }


def changed_weights(calibration: Mapping[str, Any] | None) -> bool:
    """Whether a calibration, as a checkpoint describes it, changed weights."""
    return calibration is not None and any(calibration.get(key) for key in CHANGES_OF_WEIGHTS)


def _scheme(content: Mapping[str, Any], schema: int, where: str) -> Scheme:
    scheme = Scheme.from_dict(content, where)
    return scheme if schema > 1 else with_kinds_of_today(scheme)


def with_kinds_of_today(scheme: Scheme) -> Scheme:
    """A scheme of the first releases, or of CenterPoint: rules for all kinds of then mean all of today."""
    rules = (replace(r, kinds=KINDS) if r.kinds == KINDS_WRITTEN_AS_ALL else r for r in scheme.rules)
    return replace(scheme, rules=tuple(rules))


def _layers(prepared: Prepared, amax: AmaxPolicy) -> dict[str, Any]:
    rows = {}
    for name, chosen in prepared.schemes.items():
        kind = prepared.layers[name]
        shared = prepared.shares_input_with.get(name) or prepared.shares_input_with.get(name + RESIDUAL)
        rows[name] = {
            "kind": kind,
            "arithmetic": chosen.arithmetic,
            "weight": _quantizer(chosen.weight, chosen.weight_axis(kind), amax),
            "input": _quantizer(chosen.input, None, amax),
            "bias": chosen.bias,
            "why_float": chosen.why_float,
            "why_simulated": "" if chosen.is_float else chosen.why_simulated,
            "shares_input_with": shared,
        }
    return rows


def _quantizer(chosen: QuantizerScheme, axis: int | None, amax: AmaxPolicy) -> dict[str, Any]:
    return {
        "format": chosen.format,
        "bits": chosen.bits,
        "signed": chosen.signed,
        "narrow_range": chosen.narrow_range,
        "axis": axis,
        "method": chosen.method,
        "mode": chosen.mode,
        "amax": amax,
    }


def _groups(layers: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The layers that share a quantizer, its first owner first."""
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if (first := layer["shares_input_with"]) is not None:
            member = name + RESIDUAL if layer["kind"] == "ResidualAdd" else name
            groups.setdefault(first, [first]).append(member)
    return tuple(map(tuple, groups.values()))


def _amax_policy(layers: Mapping[str, Any]) -> Any:
    """What became of the ranges, which every static quantizer says."""
    quantizers = (layer[role] for layer in layers.values() for role in ("weight", "input"))
    return next((q["amax"] for q in quantizers if q["mode"] == "static"), "frozen")
