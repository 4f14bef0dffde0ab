"""The table of what is quantized."""

from __future__ import annotations

from rich.table import Table

from cpq_train.quantization.coverage import SPARSE, count_as, coverage_of
from cpq_train.quantization.prepared import Prepared

KIND_LABELS = {SPARSE: "sparse convolutions", "ResidualAdd": "residual adds"}


def coverage_table(prepared: Prepared) -> Table:
    """Kind, layers quantized of all, at what bits, and which are left in float."""
    table = Table(title="Quantization coverage", title_justify="left")
    for header in ("layers", "quantized", "bits (weight / input)", "left in float"):
        table.add_column(header)
    coverage = coverage_of(prepared)
    for kind, (quantized, total) in coverage.counts.items():
        layers = [layer for layer in coverage.layers if count_as(layer.kind) == kind]
        left = [layer.name for layer in layers if layer.why_float]
        bits = sorted({layer.bits for layer in layers if not layer.why_float})
        float_layers = "all" if len(left) == total else ", ".join(left) or "none"
        label = KIND_LABELS.get(kind, kind)
        table.add_row(label, f"{quantized} of {total}", ", ".join(bits) or "-", float_layers)
    return table
