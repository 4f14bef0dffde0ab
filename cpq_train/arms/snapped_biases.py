"""Another kind of bias for a network that was made without: no tensor changes, the arithmetic does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cpq_train.arms.subject import Subject
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.numerics.biases import BiasKind, bias_codes, in_half_precision
from cpq_train.quantization.ranges.bias_steps import check_biases, widen_steps
from cpq_train.quantization.scheme import Rule
from cpq_train.quantization.switches import quantized_layers


@dataclass(frozen=True)
class Moved:
    """How far the biases of a layer moved.

    Attributes:
        layer: Name of the layer.
        largest: Largest distance of a channel.
        mean: Mean distance over the channels.
        share: Largest distance as a share of the layer's largest bias.
    """

    layer: str
    largest: float
    mean: float
    share: float


def snap_biases(subject: Subject, patterns: Sequence[str], kind: BiasKind) -> list[Moved]:
    """Give layers another kind of bias, in place.

    Args:
        subject: A calibrated network; its scheme says afterwards what was done, in further rules.
        patterns: Globs over the names of layers.
        kind: Of the biases. A layer without an integer sum has no `accumulator` and is left alone.

    Returns:
        The layers whose kind of bias changed; none where all had it already.

    Raises:
        UserError: A step is too small for a bias, or a bias too large for fp16.
    """
    assert subject.scheme is not None
    rules = tuple(Rule(pattern, bias=kind) for pattern in patterns)
    scheme = replace(subject.scheme, rules=subject.scheme.rules + rules)
    schemes = scheme.resolve(subject.prepared.layers)
    changed = {
        name: layer
        for name, layer in quantized_layers(subject.network).items()
        if isinstance(layer, QuantizedConvolution) and layer.bias_kind != schemes[name].bias
    }
    if not changed:
        return []
    for name, layer in changed.items():
        layer.take_bias(schemes[name])
    widen_steps(subject.network)
    check_biases(subject.network)
    subject.scheme, subject.prepared.schemes = scheme, schemes
    return [_moved(name, layer) for name, layer in changed.items() if layer.bias is not None]


@torch.no_grad()
def _moved(name: str, layer: QuantizedConvolution) -> Moved:
    if layer.bias_kind == "accumulator":
        found = bias_codes(layer.bias, layer.unit()) * layer.unit()
    else:
        found = in_half_precision(layer.bias) if layer.bias_kind == "fp16" else layer.bias
    distance = (found - layer.bias).abs()
    largest = float(distance.max())
    return Moved(name, largest, float(distance.mean()), largest / max(float(layer.bias.abs().max()), 1e-30))
