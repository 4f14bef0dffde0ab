"""The one road from a checkpoint to a network: read, describe, build, check, load.

A checkpoint needs no other file. What is asked for beyond it (another arm, BatchNorm folded) is done to the
loaded network, in `becoming`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpq_train.arms.becoming import become
from cpq_train.arms.description import Description
from cpq_train.arms.state import check_groups, check_state
from cpq_train.arms.structure import build_described
from cpq_train.arms.subject import Subject
from cpq_train.common.arm_names import Arm
from cpq_train.common.checkpoint import (
    NETWORK_PREFIX,
    network_state,
    read_checkpoint,
    write_checkpoint,
)
from cpq_train.common.files import sha256_of
from cpq_train.models import NetworkConfig
from cpq_train.quantization.batchnorm import BatchNormPolicy
from cpq_train.quantization.prepared import is_prepared, prepared_of
from cpq_train.quantization.ranges.bias_steps import check_biases
from cpq_train.quantization.scheme import Scheme


def from_content(config: NetworkConfig, checkpoint: Mapping[str, Any], path: str | Path) -> Subject:
    """The network that a checkpoint describes, with its tensors, which have been checked.

    Args:
        config: Sizes of the network; those of the checkpoint must agree.
        checkpoint: Its content.
        path: For messages.

    Raises:
        UserError: The checkpoint does not say what it is, is of another network or architecture, or holds
            tensors that are no good; or its heads are of other classes.
    """
    said, state = Description.of(checkpoint, path), network_state(checkpoint)
    said.check_centerpoint(path)
    check_groups(config, checkpoint, path)
    subject = build_described(config, said, path)
    check_state(subject.network, state, path)
    take_tensors(subject.network, said, state)
    return subject


def take_tensors(network: nn.Module, said: Description, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a checkpoint, and remember what it says of how they came about.

    Args:
        network: In the structure of the checkpoint.
        said: What the checkpoint says.
        state: Its tensors by the network's names, which have been checked.
    """
    network.load_state_dict(state)
    if is_prepared(network):
        prepared = prepared_of(network)
        prepared.provenance = said.provenance
        if said.arm == "ptq":
            prepared.remember_weights(network)


def load(config: NetworkConfig, path: str | Path) -> Subject:
    """The network of a checkpoint, as the checkpoint has it.

    Raises:
        UserError: The file is unreadable, or a layer cannot hold its bias; see `from_content`.
    """
    subject = from_content(config, read_checkpoint(path), path)
    check_biases(subject.network, f"checkpoint {str(path)!r}: ")
    return subject


def from_weights(
    config: NetworkConfig,
    path: str | Path,
    arm: Arm | None = None,
    scheme: Scheme | None = None,
    batchnorm: BatchNormPolicy | None = None,
) -> Subject:
    """Start from a checkpoint's weights.

    Args:
        config: Sizes of the network; those of the checkpoint must agree.
        path: A float checkpoint for any arm; a ptq or qat one for ptq, qat and, ranges left aside,
            float_tuned.
        arm: What to become; None stays what the checkpoint is.
        scheme: How to quantize; None takes the checkpoint's.
        batchnorm: What becomes of BatchNorm; None takes the checkpoint's, and folds that of a float network
            that becomes another arm.

    Raises:
        UserError: See `load` and `become`.
    """
    source = load(config, path)
    source_arm, parents, trained_on = source.arm, source.parents, source.trained_on
    subject = become(source, arm or source_arm, scheme, batchnorm, path)
    descent: dict[str, str] = {} if subject.arm == source_arm else {source_arm: sha256_of(path)}
    subject.parents, subject.trained_on = {**parents, **descent}, trained_on
    return subject


def fold_checkpoint(config: NetworkConfig, path: str | Path, output: str | Path) -> None:
    """Write a checkpoint of the same network with BatchNorm folded; it holds no state of training.

    Args:
        config: Sizes of the network.
        path: A float_tuned, ptq or qat checkpoint of this project.
        output: Where to.
    """
    write_subject(from_weights(config, path, batchnorm="folded"), path, output)


def write_subject(subject: Subject, source: str | Path, output: str | Path) -> None:
    """Write what was made of a checkpoint as one of its own; it holds no state of training.

    Args:
        subject: The network.
        source: The checkpoint, which says the rest.
        output: Where to.
    """
    state = {NETWORK_PREFIX + name: tensor for name, tensor in subject.network.state_dict().items()}
    kept = ("epoch", "global_step", "hyper_parameters", "data", "pytorch-lightning_version")
    checkpoint = {key: value for key, value in read_checkpoint(source, mmap=True).items() if key in kept}
    write_checkpoint({**checkpoint, "state_dict": state, "quantization": subject.describe()}, output)
