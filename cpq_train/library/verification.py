"""A prepared network against the integer reference."""

from __future__ import annotations

from typing import Any

from torch import nn

from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.ranges.calibration import check_ranges
from cpq_train.quantization.verification.layers import LayerReport, verify_layers
from cpq_train.quantization.wiring import arguments_of


def verify(network: nn.Module, example_input: Any) -> list[LayerReport]:
    """Compute every integer layer again in whole numbers, from the input that it really has, and compare.

    Args:
        network: Prepared and calibrated; it runs in evaluation mode.
        example_input: Arguments of its forward pass, as those of `prepare`.

    Returns:
        One report per quantized layer, in the order of the network; `num_mismatched` is 0 where codes, sums
        and outputs are equal, `not_covered` says why a layer is no integer sum.

    Raises:
        UserError: The network is not prepared or not calibrated, or an input has values without codes.
    """
    prepared_of(network)
    check_ranges(network)
    return verify_layers(network, arguments_of(example_input))
