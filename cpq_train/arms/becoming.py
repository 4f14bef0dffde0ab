"""What a loaded network can become: another arm, or the same with BatchNorm folded."""

from __future__ import annotations

from pathlib import Path

from cpq_train.arms.scheme_difference import scheme_difference
from cpq_train.arms.structure import restructure
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import DESCENDANTS, QUANTIZED_ARMS, Arm
from cpq_train.common.errors import UserError
from cpq_train.quantization.batchnorm import BatchNormPolicy, fold_batchnorm
from cpq_train.quantization.prepare import remove_quantizers, unquantized
from cpq_train.quantization.ranges.bias_steps import widen_steps
from cpq_train.quantization.scheme import Scheme


def become(
    subject: Subject, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None, path: str | Path
) -> Subject:
    """Turn a loaded network into an arm, in place.

    Args:
        subject: As its checkpoint has it.
        arm: What to become.
        scheme: How to quantize; None takes the checkpoint's.
        batchnorm: What becomes of BatchNorm; None takes the checkpoint's, and folds that of a float network
            that becomes another arm.
        path: The checkpoint, for messages.

    Raises:
        UserError: The arm does not descend from the checkpoint's, its scheme differs from `scheme`, its
            BatchNorm is folded and `batchnorm` would keep it, or its calibration changed the weights that
            float_tuned would start from.
    """
    if arm not in DESCENDANTS[subject.arm]:
        raise UserError(
            f"model.arm {arm!r} cannot start from {str(path)!r}, which is {subject.arm!r}; "
            f"from there: {', '.join(DESCENDANTS[subject.arm])}"
        )
    if arm == subject.arm or (subject.is_quantized and arm in QUANTIZED_ARMS):
        _check_scheme(subject, scheme, path)
        subject.arm = arm
    elif subject.is_quantized:
        subject = _without_quantizers(subject, arm, path)
    else:
        return restructure(subject.network, arm, scheme, batchnorm)
    _change_batchnorm(subject, batchnorm, path)
    return subject


def _check_scheme(subject: Subject, asked: Scheme | None, path: str | Path) -> None:
    if asked is None or subject.scheme is None:
        return
    if difference := scheme_difference(asked, subject.scheme, subject.calibration):
        raise UserError(f"checkpoint {str(path)!r} was calibrated with another scheme:\n{difference}")


def _without_quantizers(subject: Subject, arm: Arm, path: str | Path) -> Subject:
    if not subject.has_float_weights:
        raise UserError(
            f"model.arm {arm!r} cannot start from {str(path)!r}: its calibration changed the weights "
            "(model.calibration); start from the float checkpoint"
        )
    network = subject.network
    remove_quantizers(network)
    return Subject(
        arm=arm,
        batchnorm=subject.batchnorm,
        wiring=subject.wiring,
        network=network,
        prepared=unquantized(network),
    )


def _change_batchnorm(subject: Subject, asked: BatchNormPolicy | None, path: str | Path) -> None:
    if asked is None or asked == subject.batchnorm:
        return
    if subject.batchnorm == "folded" or subject.arm == "float":
        raise UserError(
            f"model.batchnorm is {asked!r}, but the BatchNorm of {str(path)!r} is {subject.batchnorm}; "
            f"accepted: {subject.batchnorm}"
        )
    if asked == "folded":
        assert subject.wiring is not None
        fold_batchnorm(subject.network, subject.wiring.folds)
        widen_steps(subject.network)  # a channel's bias may be new, and its weights next to nothing
    subject.batchnorm = asked
