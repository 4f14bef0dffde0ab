"""The structure of each arm: what becomes of a float network, and of what a checkpoint describes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cpq_train.arms.description import Description
from cpq_train.arms.said_wiring import wiring_said_by
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import TUNED_ARMS, Arm
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy, fold_batchnorm
from cpq_train.quantization.prepare import prepare_as, unquantized
from cpq_train.quantization.ranges.policy import AmaxPolicy, apply_policy
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.trace import trace
from cpq_train.quantization.wiring import Wiring


def build(
    config: NetworkConfig, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None = None
) -> Subject:
    """A network with fresh weights in the structure of `arm`; activation ranges are NaN.

    Raises:
        UserError: A quantized arm without a scheme, or a BatchNorm that the arm does not have.
    """
    return restructure(CenterPoint(config), arm, scheme, batchnorm)


def build_described(config: NetworkConfig, said: Description, path: str | Path) -> Subject:
    """The structure that a checkpoint describes, its tensors not loaded yet.

    Args:
        config: Sizes of the network.
        said: What the checkpoint says.
        path: The checkpoint, for messages.

    Raises:
        UserError: See `wiring_said_by`.
    """
    network = CenterPoint(config)
    wiring = wiring_said_by(said, network, path)
    subject = restructure(network, said.arm, said.scheme, said.batchnorm, wiring)
    set_range_policy(subject, said.amax)
    subject.calibration, subject.parents = said.calibration, dict(said.parents)
    subject.trained_on = said.trained_on
    subject.is_tuned = said.arm in TUNED_ARMS
    return subject


def restructure(
    network: CenterPoint,
    arm: Arm,
    scheme: Scheme | None,
    batchnorm: BatchNormPolicy | None,
    wiring: Wiring | None = None,
) -> Subject:
    """Give a float network, its BatchNorm still there, the structure of `arm`, in place.

    Args:
        network: A float network.
        arm: What to become.
        scheme: How to quantize; None where nothing is.
        batchnorm: What becomes of BatchNorm; None is the arm's own.
        wiring: How its layers are connected; None runs the network once to find out.
    """
    if arm == "float":
        if batchnorm not in (None, "trained"):
            raise UserError(f"model.batchnorm is {batchnorm!r}; accepted for arm 'float': trained")
        return Subject(arm=arm, batchnorm="trained", network=network, prepared=unquantized(network))
    if scheme is None and arm != "float_tuned":
        raise UserError(f"arm {arm!r} needs model.scheme, a scheme file such as configs/schemes/int8.yaml")
    wiring, batchnorm = wiring or trace(network, network.example_input()), batchnorm or "folded"
    of_arm = partial(Subject, arm=arm, batchnorm=batchnorm, wiring=wiring, network=network)
    if scheme is not None and arm != "float_tuned":
        prepared = prepare_as(network, scheme, wiring, fold=batchnorm == "folded")
        return of_arm(scheme=scheme, prepared=prepared)
    if batchnorm == "folded":
        fold_batchnorm(network, wiring.folds)
    return of_arm(prepared=unquantized(network))


def set_range_policy(subject: Subject, amax: AmaxPolicy) -> None:
    """Say what becomes of the ranges in training; learned ones become parameters."""
    subject.amax = amax
    apply_policy(subject.network, amax)
