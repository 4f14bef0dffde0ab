"""Another kind of bias for a network that was made without: no tensor changes, the arithmetic does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from cpq_train.arms.subject import Subject
from cpq_train.quantization.layers import QuantizedConvolution
from cpq_train.quantization.numerics.biases import BiasKind, bias_codes, rounded_to_half
from cpq_train.quantization.ranges.bias_steps import check_biases, widen_steps
from cpq_train.quantization.scheme import Rule
from cpq_train.quantization.switches import quantized_layers


@dataclass(frozen=True)
class Moved:
    """How far the biases of a layer moved.

    Attributes:
        layer: Name of the layer.
        kind: Of its bias, now.
        largest: Largest distance of a channel.
        mean: Mean distance over the channels.
        share: Largest distance as a share of the layer's largest bias.
    """

    layer: str
    kind: BiasKind
    largest: float
    mean: float
    share: float


def snap_biases(subject: Subject, kinds: Mapping[str, BiasKind]) -> list[Moved]:
    """Give layers another kind of bias, and widen steps that have become too small where the scheme says so.

    Args:
        subject: A calibrated network, changed in place; its scheme says afterwards what was done, in further
            rules.
        kinds: Glob over names of layers -> kind of their biases. A layer without an integer sum, or
            with a dynamic input range, has no `accumulator` and is left alone.

    Returns:
        The layers whose bias is another one now; none where nothing changed.

    Raises:
        UserError: A step is too small for a bias, or a bias too large for fp16.
    """
    assert subject.scheme is not None
    rules = tuple(Rule(pattern, bias=kind) for pattern, kind in kinds.items())
    scheme = replace(subject.scheme, rules=subject.scheme.rules + rules)
    schemes = scheme.resolve(subject.prepared.layers)
    layers = {
        name: layer
        for name, layer in quantized_layers(subject.network).items()
        if isinstance(layer, QuantizedConvolution) and layer.bias is not None
    }
    changed = [name for name, layer in layers.items() if layer.bias_kind != schemes[name].bias]
    for name in changed:
        layers[name].take_bias(schemes[name])
    changed += widen_steps(subject.network)
    check_biases(subject.network)
    if changed:
        subject.scheme = subject.prepared.scheme = scheme
        subject.prepared.schemes = schemes
    return [_moved(name, layer) for name, layer in layers.items() if name in changed]


@torch.no_grad()
def _moved(name: str, layer: QuantizedConvolution) -> Moved:
    if layer.bias_kind == "accumulator":
        found = bias_codes(layer.bias, layer.unit()) * layer.unit()
    else:
        found = rounded_to_half(layer.bias) if layer.bias_kind == "fp16" else layer.bias
    distance = (found - layer.bias).abs()
    largest = float(distance.max())
    share = largest / max(float(layer.bias.abs().max()), 1e-30)
    return Moved(name, layer.bias_kind, largest, float(distance.mean()), share)
