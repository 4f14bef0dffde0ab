"""The table of what is quantized."""

from __future__ import annotations

from rich.table import Table

from cpq_train.quantization.prepare import Prepared, coverage

KIND_LABELS = {"sparse": "sparse convolutions", "ResidualAdd": "residual adds"}


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
