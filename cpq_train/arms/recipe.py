"""What a checkpoint says of itself, and the tables that a person reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.table import Table

from cpq_train.quantization.prepare import RESIDUAL, Prepared, coverage
from cpq_train.quantization.scheme import QuantizerScheme, Scheme

SCHEMA = 1
ARMS = ("float", "float_tuned", "ptq", "qat")
KIND_LABELS = {"sparse": "sparse convolutions", "ResidualAdd": "residual adds"}


def recipe(
    arm: str,
    scheme: Scheme | None,
    prepared: Prepared,
    batchnorm: str,
    amax: str,
    calibration: Mapping[str, Any] | None,
    parents: Mapping[str, str],
) -> dict[str, Any]:
    """The `quantization` entry of a checkpoint (plain values only).

    Args:
        arm: One of `ARMS`.
        scheme: The scheme, None for a float network.
        prepared: What `prepare` or `unquantized` returned.
        batchnorm: "folded", "frozen" or "trained".
        amax: "frozen", "moving" or "learned".
        calibration: How the ranges were found, None where none were.
        parents: Arm -> SHA-256 of the checkpoints this one came from.
    """
    return {
        "schema": SCHEMA,
        "arm": arm,
        "scheme": None if scheme is None else scheme.to_dict(),
        "batchnorm": batchnorm,
        "layers": _layers(prepared, amax),
        "calibration": None if calibration is None else dict(calibration),
        "parents": dict(parents),
    }


def _layers(prepared: Prepared, amax: str) -> dict[str, Any]:
    rows = {}
    for name, chosen in prepared.schemes.items():
        kind = prepared.layers[name]
        shared = prepared.shares_input_with.get(name) or prepared.shares_input_with.get(name + RESIDUAL)
        rows[name] = {
            "kind": kind,
            "arithmetic": chosen.arithmetic,
            "weight": _quantizer(chosen.weight, chosen.weight_axis(kind), amax),
            "input": _quantizer(chosen.input, None, amax),
            "why_float": chosen.why_float,
            "why_simulated": "" if chosen.is_float else chosen.why_simulated,
            "shares_input_with": shared,
        }
    return rows


def _quantizer(chosen: QuantizerScheme, axis: int | None, amax: str) -> dict[str, Any]:
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


def amax_policy(description: Mapping[str, Any]) -> Any:
    """What became of the ranges of a checkpoint, from its `quantization` entry."""
    quantizers = (layer[role] for layer in description["layers"].values() for role in ("weight", "input"))
    return next((str(q["amax"]) for q in quantizers if q["mode"] == "static"), "frozen")


def coverage_table(prepared: Prepared) -> Table:
    """Kind, layers quantized of all, at what bits, and which are left in float."""
    table = Table(title="Quantization coverage", title_justify="left")
    for header in ("layers", "quantized", "bits (weight / input)", "left in float"):
        table.add_column(header)
    for kind, (quantized, total) in coverage(prepared).items():
        names = [n for n, k in prepared.layers.items() if _label(k) == _label(kind)]
        left = [n for n in names if prepared.schemes[n].is_float]
        bits = sorted({_bits(prepared, n) for n in names if n not in left})
        float_layers = "all" if len(left) == total else ", ".join(left) or "none"
        table.add_row(_label(kind), f"{quantized} of {total}", ", ".join(bits) or "-", float_layers)
    return table


def _label(kind: str) -> str:
    kind = "sparse" if kind in ("SubMConv3d", "SparseConv3d") else kind
    return KIND_LABELS.get(kind, kind)


def _bits(prepared: Prepared, name: str) -> str:
    chosen = prepared.schemes[name]
    weight, input_ = (
        "-" if q.is_off else "fp8" if q.format == "fp8_e4m3" else str(q.bits)
        for q in (chosen.weight, chosen.input)
    )
    return f"{weight} / {input_}{'' if chosen.input.mode != 'dynamic' else ' dynamic'}"


def same_scheme(a: Scheme, b: Scheme) -> bool:
    """Whether two schemes quantize alike, whatever they are called."""
    return replace(a, name="") == replace(b, name="")
