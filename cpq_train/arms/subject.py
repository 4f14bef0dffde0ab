"""A network as one of the four arms.

float: BatchNorm trains, nothing is quantized. float_tuned: BatchNorm as in qat, no quantizers: the control
that says what more training alone brings. ptq, qat: layers quantized as the scheme says, BatchNorm folded, or
kept frozen or trained and folded behind training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpq_train.arms.description import Description, changed_weights
from cpq_train.models import CenterPoint
from cpq_train.quantization.prepared import Prepared
from cpq_train.quantization.ranges.calibration import is_calibrated


@dataclass(kw_only=True)
class Subject(Description):
    """A network as one of the arms, with what its checkpoint says of it.

    Attributes:
        network: The network in the structure of `arm`.
        prepared: Which layers could be quantized, and what was.
        is_tuned: Whether its weights are no longer those it was calibrated or folded with.
    """

    network: CenterPoint
    prepared: Prepared
    is_tuned: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether it has quantizers."""
        return self.scheme is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether activation ranges are still missing."""
        return self.is_quantized and not is_calibrated(self.network)

    @property
    def has_float_weights(self) -> bool:
        """Whether the weights, quantizers off, are those of the float checkpoint it came from."""
        return not (self.is_tuned or changed_weights(self.calibration))

    def describe(self) -> dict[str, Any]:
        """The `quantization` entry of its checkpoint."""
        return self.entry(self.prepared)
