"""The structure of each arm: what becomes of a float network, and of what a checkpoint describes."""

from __future__ import annotations

from itertools import pairwise

from cpq_train.arms.description import Description
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import TUNED_ARMS, Arm
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.topology import bev_levels, hidden_convolutions, names_of, residual_blocks
from cpq_train.quantization.batchnorm import BatchNormPolicy, fold_batchnorm
from cpq_train.quantization.prepare import RESIDUAL, prepare, unquantized
from cpq_train.quantization.ranges.policy import AmaxPolicy, apply_policy
from cpq_train.quantization.scheme import Scheme


def build(
    config: NetworkConfig, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None = None
) -> Subject:
    """A network with fresh weights in the structure of `arm`; activation ranges are NaN.

    Raises:
        UserError: A quantized arm without a scheme, or a BatchNorm that the arm does not have.
    """
    return restructure(CenterPoint(config), arm, scheme, batchnorm)


def build_described(config: NetworkConfig, said: Description) -> Subject:
    """The structure that a checkpoint describes, its tensors not loaded yet."""
    subject = build(config, said.arm, said.scheme, said.batchnorm)
    set_range_policy(subject, said.amax)
    subject.calibration, subject.parents = said.calibration, dict(said.parents)
    subject.trained_on = said.trained_on
    subject.is_tuned = said.arm in TUNED_ARMS
    return subject


def restructure(
    network: CenterPoint, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None
) -> Subject:
    """Give a float network, its BatchNorm still there, the structure of `arm`, in place."""
    if arm == "float":
        if batchnorm not in (None, "trained"):
            raise UserError(f"model.batchnorm is {batchnorm!r}; accepted for arm 'float': trained")
        return Subject(arm=arm, batchnorm="trained", network=network, prepared=unquantized(network))
    batchnorm = batchnorm or "folded"
    if arm == "float_tuned":
        if batchnorm == "folded":
            fold_batchnorm(network)
        return Subject(arm=arm, batchnorm=batchnorm, network=network, prepared=unquantized(network))
    if scheme is None:
        raise UserError(f"arm {arm!r} needs model.scheme, a scheme file such as configs/schemes/int8.yaml")
    prepared = prepare(network, scheme, tensors_read_together(network), fold=batchnorm == "folded")
    return Subject(arm=arm, scheme=scheme, batchnorm=batchnorm, network=network, prepared=prepared)


def set_range_policy(subject: Subject, amax: AmaxPolicy) -> None:
    """Say what becomes of the ranges in training; learned ones become parameters."""
    subject.amax = amax
    apply_policy(subject.network, amax)


def tensors_read_together(network: CenterPoint) -> list[list[str]]:
    """Names of the layers that read one tensor of CenterPoint, a group per tensor.

    The hidden convolutions of the head read the shared convolution's output; the input of a residual block
    feeds its first convolution and its add; the output of a BEV level feeds the next level and its own
    upsampling.
    """
    names = names_of(network)
    head = [names[layer] for layer in hidden_convolutions(network)]
    blocks = [[names[b.conv1], names[b.quant_add] + RESIDUAL] for b in residual_blocks(network)]
    levels = bev_levels(network)
    bev = [[names[first], names[up]] for (_, up), (first, _) in pairwise(levels)]
    return [head, *blocks, *bev]
