"""The structure of each arm: what becomes of a float network, and of what a checkpoint describes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cpq_train.arms.description import Description
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import TUNED_ARMS, Arm
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy, fold_batchnorm
from cpq_train.quantization.layers.kinds import kind_of
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


def build_described(config: NetworkConfig, said: Description) -> Subject:
    """The structure that a checkpoint describes, its tensors not loaded yet."""
    network = CenterPoint(config)
    wiring = wiring_said_by(said, network)
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


def wiring_said_by(said: Description, network: nn.Module) -> Wiring:
    """How a checkpoint has the layers of its network connected, as far as `network` has them.

    Args:
        said: What the checkpoint says.
        network: A float network.
    """
    wiring = said.wiring or _registered_wiring(network, said.groups_of_schema_1)
    return wiring.within({name for name, _ in network.named_modules()})


def _registered_wiring(network: nn.Module, groups: Sequence[Sequence[str]]) -> Wiring:
    """How the layers of a file of schema 1 are connected, which does not say.

    Its releases folded a BatchNorm into the layer registered directly before it.

    Args:
        network: A float network.
        groups: Layers that share a quantizer in the file.
    """
    folds = {
        f"{parent_name}.{norm_name}".lstrip("."): f"{parent_name}.{name}".lstrip(".")
        for parent_name, parent in network.named_modules()
        for (name, layer), (norm_name, norm) in pairwise(parent.named_children())
        if kind_of(layer) is not None and isinstance(norm, _BatchNorm)
    }
    return Wiring(one_tensor=tuple(map(tuple, groups)), folds=folds)
