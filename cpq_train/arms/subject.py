"""A network as one of the four arms.

float: BatchNorm trains, nothing is quantized. float_tuned: BatchNorm as in qat, no quantizers: the control
that says what more training alone brings. ptq, qat: layers quantized as the scheme says, BatchNorm folded, or
kept frozen or trained and folded behind training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cpq_train.arms.description import Description, changed_weights
from cpq_train.common.arm_names import Arm
from cpq_train.models import CenterPoint
from cpq_train.quantization.batchnorm import BatchNormPolicy
from cpq_train.quantization.prepare import Prepared
from cpq_train.quantization.ranges.calibration import is_calibrated
from cpq_train.quantization.ranges.policy import AmaxPolicy
from cpq_train.quantization.scheme import Scheme


@dataclass
class Subject:
    """A network as one of the arms, with what its checkpoint says of it.

    Args:
        network: The network in the structure of `arm`.
        arm: Which arm it is.
        prepared: Which layers could be quantized, and what was.
        scheme: How it is quantized, None where it is not.
        batchnorm: What became of its BatchNorm.
        amax: What becomes of its ranges in training.
        calibration: How its ranges were found.
        parents: Arm -> SHA-256 of the checkpoints it came from; `teacher` -> that of the one it learned from.
        is_tuned: Whether its weights are no longer those it was calibrated or folded with.
    """

    network: CenterPoint
    arm: Arm
    prepared: Prepared
    scheme: Scheme | None = None
    batchnorm: BatchNormPolicy = "folded"
    amax: AmaxPolicy = "frozen"
    calibration: dict[str, Any] | None = None
    parents: dict[str, str] = field(default_factory=dict)
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
        said = Description(self.arm, self.scheme, self.batchnorm, self.amax, self.calibration, self.parents)
        return said.entry(self.prepared)
