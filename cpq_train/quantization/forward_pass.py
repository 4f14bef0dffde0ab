"""What a prepared network does around each of its forward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cpq_train.quantization.layers.rounded_weights import WeightTable
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.range_table import RangeTable
from cpq_train.quantization.scope import Scope
from cpq_train.quantization.switches import quantized_layers, quantizers


def begin_forward(network: nn.Module, inputs: Any) -> None:
    """Open the scope; work out all static ranges, and round the weights of all integer layers.

    A weight that is written to during the pass is rounded again, a range counts from the next pass on.
    """
    if torch.compiler.is_compiling():
        return
    scope = prepared_of(network).scope
    scope.begin_forward()
    has_gradient = torch.is_grad_enabled()
    if scope.is_frozen and scope.worked_out is not None and (scope.weights or has_gradient):
        return
    # Not in inference mode: what is made there could not be saved for a backward pass in a frozen scope.
    with torch.inference_mode(False), torch.set_grad_enabled(has_gradient and not scope.is_frozen):
        _work_out(network, scope)


def end_forward(network: nn.Module, inputs: Any, output: Any) -> None:
    """Close the scope."""
    if not torch.compiler.is_compiling():
        prepared_of(network).scope.end_forward()


def _work_out(network: nn.Module, scope: Scope) -> None:
    if scope.members is None:
        static = [q for q in quantizers(network).values() if q.scheme.mode == "static"]
        scope.members = static, quantized_layers(network)
    static, layers = scope.members
    if len({quantizer._buffers["_amax"].device for quantizer in static}) != 1:
        return  # none, or on several devices: each quantizer and layer works by itself
    ranges: RangeTable | None = scope.range_table
    if ranges is None or not ranges.is_of(static):
        ranges = scope.range_table = RangeTable(static)
    weights: WeightTable | None = scope.weight_table
    if weights is None or not weights.is_current(ranges):
        weights = scope.weight_table = WeightTable(layers, ranges)
    scope.worked_out = ranges.work_out()
    scope.weights = weights.round(scope.worked_out)
