"""The ranges of a prepared network, and BatchNorm folded behind its training."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.batchnorm import fold_batchnorm
from cpq_train.quantization.prepare import settle_unfit
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.ptq.range_search import is_searched
from cpq_train.quantization.ranges.bias_steps import check_biases, widen_steps
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.switches import quantizers
from cpq_train.quantization.wiring import arguments_of


def calibrate(network: nn.Module, batches: Iterable[Any]) -> None:
    """Find the activation ranges of a prepared network, in place.

    The network runs in float and in evaluation mode; where there is a process group, every rank has to come
    here with batches of its own, and all get the same ranges.

    Args:
        network: What `prepare` made.
        batches: Arguments of its forward pass, as `example_input` of `prepare`.

    Raises:
        UserError: The network is not prepared, a range came out unfit (NaN, infinite, zero, or of a layer
            that saw nothing) and the scheme has it an error, a step is too small for a bias, or the scheme
            asks for a method that needs a detector.
    """
    prepared = prepared_of(network)
    assert prepared.scheme is not None
    if any(is_searched(quantizer) for quantizer in quantizers(network).values()):
        raise UserError(
            "method foreground looks at heads of a CenterPoint and needs the verb calibrate; accepted: max, "
            "mse, percentile, entropy"
        )
    num_batches = 0
    with collecting_ranges(network, partial(settle_unfit, network)):
        for batch in batches:
            network(*arguments_of(batch))
            num_batches += 1
    widen_steps(network)
    check_biases(network)
    prepared.provenance["calibration"] = {
        "method": prepared.scheme.defaults.input.method,
        "num_batches": num_batches,
        "left_in_float": list(prepared.left_in_float),
    }
    prepared.remember_weights(network)


def fold(network: nn.Module) -> None:
    """Multiply the BatchNorm that `prepare(..., fold=False)` kept into its layers, in place.

    Codes stay what they were: the ranges of the weights are scaled along.

    Raises:
        UserError: The network is not prepared, a weight has one range for several output channels, or a step
            is too small for its new bias and the scheme has it an error.
    """
    prepared = prepared_of(network)
    is_tuned = prepared.is_tuned(network)
    fold_batchnorm(network, prepared.folds)
    widen_steps(network)
    check_biases(network)
    if not is_tuned:
        prepared.remember_weights(network)
