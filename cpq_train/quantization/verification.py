"""The forward pass that training uses against the integer reference: layer by layer, and end to end.

Numbers are compared for equality, with no tolerance. (A whole number has no sign of zero, so 0.0 and -0.0
are equal.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpq_train.errors import UserError
from cpq_train.quantization import reference
from cpq_train.quantization.observation import (
    Array,
    Observed,
    evaluate,
    observing,
    quantized_layers,
    why_not_covered,
)
from cpq_train.sparse import SparseConvTensor

FLIP_REASON = (
    "layers that stay float, and the float operations between integer layers, may round differently when "
    "they run with another memory layout, thread count or device; a value beside a tie then falls on its "
    "other side"
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
        mismatched_sums: Sums that differ, before they are scaled (0 for a residual add, which has none).
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
    layers, reports = quantized_layers(network), {}
    covered = {name: layer for name, layer in layers.items() if not why_not_covered(layer)}

    def take(name: str, layer: Any, arguments: tuple[Any, ...], seen: Observed) -> None:
        report = _compare(name, layer, seen, _evaluate(name, layer, arguments))
        reports[name] = reports[name] + report if name in reports else report

    with observing(covered, take):
        _run(network, inputs)
    for name, layer in layers.items():
        reason = why_not_covered(layer) or "no input reached it"
        arithmetic = "integer" if layer.is_integer else "simulated"
        reports.setdefault(name, LayerReport(name, layer.kind, arithmetic, reason))
    return [reports[name] for name in layers]


def _evaluate(name: str, layer: Any, arguments: tuple[Any, ...]) -> reference.Evaluation:
    try:
        return evaluate(layer, arguments)
    except UserError as error:
        raise UserError(f"layer {name!r}: {error}") from error


@torch.no_grad()
def _run(network: nn.Module, inputs: Sequence[Any]) -> Any:
    training = network.training
    network.eval()
    try:
        return network(*inputs)
    finally:
        network.train(training)


def _compare(name: str, layer: Any, seen: Observed, expected: reference.Evaluation) -> LayerReport:
    num_lost = 0
    if seen.positions is not None:
        expected, num_lost = _in_the_order_of(expected, seen)
    difference = np.abs(seen.output - expected.output.astype(np.float64)) / expected.unit
    difference = np.nan_to_num(difference, nan=np.inf)
    wrong_sums = 0 if seen.sums is None else _num_unequal(seen.sums, expected.sums.astype(np.float32))
    largest = float(difference.max(initial=0))
    return LayerReport(
        name,
        layer.kind,
        "integer",
        num_codes=seen.codes.size + seen.weight_codes.size,
        num_sums=expected.output.size,
        mismatched_codes=_num_unequal(seen.codes, expected.codes)
        + _num_unequal(seen.weight_codes, expected.weight_codes),
        mismatched_sums=wrong_sums,
        mismatched_outputs=_num_unequal(seen.output, expected.output) + num_lost * expected.output.shape[1],
        largest_difference=largest,
        where=_place(difference, seen.positions) if largest else "",
    )


def _num_unequal(a: Array, b: Array) -> int:
    return int(np.count_nonzero(a != b))


def _in_the_order_of(expected: reference.Evaluation, seen: Observed) -> tuple[reference.Evaluation, int]:
    """The reference's rows in the layer's order (NaN where it has no such voxel), and how many are left."""
    assert expected.positions is not None
    assert seen.positions is not None
    rows = reference.RowOf(expected.positions, seen.shape)(seen.positions)
    is_known = (rows >= 0)[:, None]
    output = np.where(is_known, expected.output[rows], np.float32(np.nan))
    sums = np.where(is_known, expected.sums[rows], np.iinfo(np.int64).min)
    num_lost = len(expected.positions) - int(is_known.sum())
    return expected._replace(output=output, sums=sums, positions=seen.positions), num_lost


def _place(difference: Array, positions: Array | None) -> str:
    index = [int(i) for i in np.unravel_index(difference.argmax(), difference.shape)]
    if positions is None:
        return f"index {tuple(index)}"
    return f"voxel {tuple(positions[index[0]].tolist())}, channel {index[1]}"


@dataclass
class EndToEnd:
    """A network, and the same network with the reference in place of its integer layers.

    Args:
        output: Of the network.
        reference_output: Of the network on the reference.
        num_codes: Codes entering integer layers.
        num_flipped: Those that differ by one step.
        num_further: Those that differ by more.
        flipped_by_layer: Layer -> codes that differ, where any do.
        num_outputs: Numbers in the output.
        mismatched_outputs: Those that differ.
        largest_difference: Of the outputs.
    """

    output: Any
    reference_output: Any
    num_codes: int = 0
    num_flipped: int = 0
    num_further: int = 0
    flipped_by_layer: dict[str, int] = field(default_factory=dict)
    num_outputs: int = 0
    mismatched_outputs: int = 0
    largest_difference: float = 0.0


def verify_end_to_end(network: nn.Module, inputs: Sequence[Any]) -> EndToEnd:
    """Run a network twice, with its own integer layers and with the reference in their place, and compare.

    Where codes differ although the layers agree, see `FLIP_REASON`.

    Raises:
        UserError: A layer's input has values without integer codes, or its output has other voxels than the
            reference finds.
    """
    seen: dict[str, Observed] = {}
    layers = {n: layer for n, layer in quantized_layers(network).items() if not why_not_covered(layer)}
    with observing(layers, lambda name, _, __, observed: seen.update({name: _codes_only(observed)})):
        output = _run(network, inputs)
    codes: dict[str, Array] = {}
    with _reference_in_place_of(layers, seen, codes):
        result = EndToEnd(output, _run(network, inputs))
    for name, theirs in codes.items():
        _count_flips(result, name, np.abs(seen[name].codes - theirs))
    for a, b in zip(_tensors(result.output), _tensors(result.reference_output), strict=True):
        result.num_outputs += a.numel()
        result.mismatched_outputs += int((a != b).sum())
        result.largest_difference = max(result.largest_difference, float((a - b).abs().max()))
    return result


def _codes_only(observed: Observed) -> Observed:
    nothing = observed.output[:0]
    return observed._replace(
        codes=observed.codes.astype(np.int32), weight_codes=nothing, sums=None, output=nothing
    )


def _count_flips(result: EndToEnd, name: str, steps: Array) -> None:
    result.num_codes += steps.size
    result.num_flipped += int((steps == 1).sum())
    result.num_further += int((steps > 1).sum())
    if steps.any():
        result.flipped_by_layer[name] = int(np.count_nonzero(steps))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


@contextmanager
def _reference_in_place_of(
    layers: Mapping[str, Any], seen: Mapping[str, Observed], codes: dict[str, Array]
) -> Iterator[None]:
    """While open, the layers compute with the reference and leave the codes of their inputs in `codes`."""
    for name, layer in layers.items():
        layer.forward = _reference_forward(name, layer, seen, codes)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _reference_forward(
    name: str, layer: Any, seen: Mapping[str, Observed], codes: dict[str, Array]
) -> Callable[..., Any]:
    def forward(*arguments: Any) -> Any:
        result = _evaluate(name, layer, arguments)
        codes[name] = result.codes
        x = arguments[0]
        if not isinstance(x, SparseConvTensor):
            return torch.from_numpy(result.output).to(x.device)
        ordered, num_lost = _in_the_order_of(result, seen[name])
        if num_lost or np.isnan(ordered.output).any():
            raise UserError(f"layer {name!r}: its output has other voxels than the reference finds")
        out = x.replace_feature(torch.from_numpy(ordered.output).to(x.features.device))
        if layer.kind == "SparseConv3d":
            out.indices = torch.from_numpy(seen[name].positions).to(x.indices)
            out.spatial_shape = list(seen[name].shape)
        return out

    return forward
