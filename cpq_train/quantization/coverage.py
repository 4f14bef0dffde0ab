"""What of a network is quantized, and why the rest is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from cpq_train.quantization.prepared import Prepared, prepared_of
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme

SPARSE = "sparse"
"""What the kinds of sparse convolution count as."""

UNKNOWN_KIND = "this kind of layer is not quantized"


class CoveredLayer(NamedTuple):
    """A module with parameters of its own, or a residual add.

    Attributes:
        name: In the network; empty for the network itself.
        kind: Of the layer.
        bits: Of weight and input where it is quantized, such as "8 / 8".
        why_float: Why it is not quantized; empty where it is.
    """

    name: str
    kind: str
    bits: str
    why_float: str = ""


class Coverage(NamedTuple):
    """Every layer of a network, but the normalisations that are, or will be, folded into one.

    Attributes:
        layers: In the order of the network, those that cannot be quantized behind the others.
    """

    layers: tuple[CoveredLayer, ...]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Kind -> (layers quantized, all layers); the kinds of sparse convolution count as `sparse`."""
        counts: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            kind = count_as(layer.kind)
            quantized, total = counts.get(kind, (0, 0))
            counts[kind] = (quantized + int(not layer.why_float), total + 1)
        return counts

    @property
    def left_in_float(self) -> dict[str, str]:
        """Name -> why, of every layer that is not quantized."""
        return {layer.name: layer.why_float for layer in self.layers if layer.why_float}

    def __str__(self) -> str:
        """Counts by kind, and the layers left in float with their reasons."""
        lines = [f"{kind}: {quantized} of {total}" for kind, (quantized, total) in self.counts.items()]
        left = [f"  {name or '(the network itself)'}: {why}" for name, why in self.left_in_float.items()]
        return "\n".join([*lines, *(["left in float:", *left] if left else [])])


def coverage_of(prepared: Prepared) -> Coverage:
    """What `prepare` quantized, and why it left the rest in float."""
    return Coverage(tuple(_layers(prepared)))


def coverage(network: nn.Module) -> Coverage:
    """What of a prepared network is quantized, and why the rest is not.

    Raises:
        UserError: The network is not prepared.
    """
    return coverage_of(prepared_of(network))


def count_as(kind: str) -> str:
    """The kind that a layer is counted as."""
    return SPARSE if kind in ("SubMConv3d", "SparseConv3d", "SparseInverseConv3d") else kind


def _layers(prepared: Prepared) -> Iterator[CoveredLayer]:
    for name, chosen in prepared.schemes.items():
        yield CoveredLayer(name, prepared.layers[name], _bits(chosen), _why_float(chosen))
    for name, kind in prepared.unknown.items():
        yield CoveredLayer(name, kind, "-", UNKNOWN_KIND)
    if prepared.wiring is not None:
        for name, why in prepared.wiring.unfolded.items():
            yield CoveredLayer(name, "BatchNorm", "-", f"cannot be folded: {why}")


def _why_float(chosen: LayerScheme) -> str:
    return (chosen.why_float or "the scheme") if chosen.is_float else ""


def _bits(chosen: LayerScheme) -> str:
    if chosen.is_float:
        return "-"
    dynamic = " dynamic" if chosen.input.mode == "dynamic" else ""
    return f"{_width(chosen.weight)} / {_width(chosen.input)}{dynamic}"


def _width(scheme: QuantizerScheme) -> str:
    return "-" if scheme.is_off else "fp8" if scheme.format == "fp8_e4m3" else str(scheme.bits)
