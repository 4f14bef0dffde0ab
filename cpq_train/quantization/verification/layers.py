"""The forward pass that training uses against the integer reference, layer by layer.

Numbers are compared for equality, with no tolerance. (A whole number has no sign of zero, so 0.0 and -0.0
are equal.) `end_to_end.py` compares whole networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from cpq_train.quantization import reference
from cpq_train.quantization.switches import quantized_layers
from cpq_train.quantization.verification.observation import (
    Array,
    Observed,
    evaluate,
    in_the_order_of,
    observing,
    run,
    why_not_covered,
)


@dataclass(frozen=True)
class LayerReport:
    """One layer and the reference on the same inputs.

    Args:
        name: Module name.
        kind: Kind of layer.
        arithmetic: "integer" or "simulated".
        not_covered: Why the reference says nothing of it; empty where it does.
        num_codes: Codes compared, of inputs and weight.
        num_sums: Sums, and as many outputs, compared.
        mismatched_codes: Codes that differ.
        mismatched_sums: Sums that differ, before they are scaled (0 for a residual add, which scales first).
        mismatched_outputs: Outputs that differ.
        largest_difference: Of the outputs, in units of one product of codes (of one code for a residual add).
        where: The place of that difference, empty where there is none.
    """

    name: str
    kind: str
    arithmetic: str
    not_covered: str = ""
    num_codes: int = 0
    num_sums: int = 0
    mismatched_codes: int = 0
    mismatched_sums: int = 0
    mismatched_outputs: int = 0
    largest_difference: float = 0.0
    where: str = ""

    @property
    def num_mismatched(self) -> int:
        """Codes, sums and outputs that differ."""
        return self.mismatched_codes + self.mismatched_sums + self.mismatched_outputs

    def __add__(self, other: LayerReport) -> LayerReport:
        """The same layer over the inputs of both reports."""
        if self.not_covered or other.not_covered:
            return other if self.not_covered else self
        worse = max(self, other, key=lambda report: report.largest_difference)
        counts = ("num_codes", "num_sums", "mismatched_codes", "mismatched_sums", "mismatched_outputs")
        return replace(worse, **{name: getattr(self, name) + getattr(other, name) for name in counts})


def verify_layers(network: nn.Module, inputs: Sequence[Any]) -> list[LayerReport]:
    """Compare every quantized layer with the reference on the input that the layer really had.

    Args:
        network: A calibrated network.
        inputs: Arguments of its forward pass.

    Returns:
        One report per quantized layer, in the order of the network; those that the reference does not cover
        say why.

    Raises:
        UserError: A layer's input has values without integer codes.
    """
    layers = quantized_layers(network)
    reports: dict[str, LayerReport] = {}
    covered = {name: layer for name, layer in layers.items() if not why_not_covered(layer)}

    def take(name: str, layer: Any, arguments: tuple[Any, ...], seen: Observed) -> None:
        report = _compare(name, layer.kind, seen, evaluate(name, layer, arguments))
        reports[name] = reports[name] + report if name in reports else report

    with observing(covered, take):
        run(network, inputs)
    for name, layer in layers.items():
        reason = why_not_covered(layer) or "no input reached it"
        arithmetic = "simulated" if layer.why_simulated else "integer"
        reports.setdefault(name, LayerReport(name, layer.kind, arithmetic, reason))
    return [reports[name] for name in layers]


def _compare(name: str, kind: str, seen: Observed, expected: reference.LayerResult) -> LayerReport:
    num_lost = 0
    if seen.positions is not None:
        expected, num_lost = in_the_order_of(seen, expected)
    difference = np.abs(seen.output - expected.output.astype(np.float64)) / expected.unit
    difference = np.nan_to_num(difference, nan=np.inf, posinf=np.inf)
    largest = float(difference.max(initial=0))
    return LayerReport(
        name,
        kind,
        "integer",
        num_codes=seen.codes.size + seen.weight_codes.size,
        num_sums=expected.output.size,
        mismatched_codes=_num_unequal(seen.codes, expected.codes)
        + _num_unequal(seen.weight_codes, expected.weight_codes),
        # The layer's sums are fp32 by now: the whole number, rounded once.
        mismatched_sums=0 if seen.sums is None else _num_unequal(seen.sums, expected.sums.astype(np.float32)),
        mismatched_outputs=_num_unequal(seen.output, expected.output) + num_lost * expected.output.shape[-1],
        largest_difference=largest,
        where=_place(difference, seen.positions) if largest else "",
    )


def _num_unequal(a: Array, b: Array) -> int:
    return int(np.count_nonzero(a != b))


def _place(difference: Array, positions: Array | None) -> str:
    index = [int(i) for i in np.unravel_index(difference.argmax(), difference.shape)]
    if positions is None:
        return f"index {tuple(index)}"
    return f"voxel {tuple(positions[index[0]].tolist())}, channel {index[1]}"
