"""A prepared network in a checkpoint that says what it is, and back."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

from torch import nn

from cpq_train.arms.description import Description
from cpq_train.arms.state import check_state
from cpq_train.arms.structure import wiring_said_by
from cpq_train.common.checkpoint import (
    NETWORK_PREFIX,
    NOT_TRAINED,
    network_state,
    read_checkpoint,
    write_checkpoint,
)
from cpq_train.models import CenterPoint
from cpq_train.quantization.batchnorm import fold_batchnorm, kept_batchnorms
from cpq_train.quantization.prepare import check_float, prepare_as
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.ranges.bias_steps import check_biases
from cpq_train.quantization.ranges.calibration import check_ranges
from cpq_train.quantization.ranges.policy import apply_policy, range_parameters
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.settings import HYPER_PARAMETERS


def save(network: nn.Module, path: str | Path) -> None:
    """Write a prepared and calibrated network as a checkpoint, for `load` and, of a CenterPoint, all verbs.

    It holds tensors and plain values only, and how the network's layers are connected: loading it needs no
    example input. Its arm is `ptq` while the weights are those that were calibrated, `qat` afterwards.

    Args:
        network: What `prepare` made.
        path: Where to; appears only once it is whole.

    Raises:
        UserError: The network is not prepared, or a range is missing or unfit.
    """
    prepared = prepared_of(network)
    check_ranges(network)
    said = Description(
        arm="qat" if prepared.is_tuned(network) else "ptq",
        scheme=prepared.scheme,
        batchnorm="trained" if kept_batchnorms(network, prepared.folds) else "folded",
        amax="learned" if range_parameters(network) else "frozen",
        wiring=prepared.wiring,
        **prepared.provenance,
    )
    state = {NETWORK_PREFIX + name: tensor for name, tensor in network.state_dict().items()}
    content = {**NOT_TRAINED, "state_dict": state, "quantization": said.entry(prepared)}
    if isinstance(network, CenterPoint):
        content[HYPER_PARAMETERS] = {"network": asdict(network.config)}
    write_checkpoint(content, path)


def load(path: str | Path, network: nn.Module | None = None) -> nn.Module:
    """The network of a checkpoint of any arm, on the CPU.

    Args:
        path: A checkpoint of this project.
        network: The float network that it was prepared from, with any weights; it is prepared and filled in
            place. None builds the CenterPoint that the checkpoint describes.

    Returns:
        The network.

    Raises:
        UserError: The checkpoint is unreadable or damaged, or is of another network; `network` is then what
            it was.
    """
    if network is None:
        return CenterPointDetector.load_from_checkpoint(path).network
    check_float(network)
    content = read_checkpoint(path)
    said, state = Description.of(content, path), network_state(content)
    trial = copy.deepcopy(network)
    _take_structure(trial, said)
    check_state(trial, state, path, "the network")
    _take_structure(network, said)
    network.load_state_dict(state)
    check_biases(network, f"checkpoint {str(path)!r}: ")
    if said.arm == "ptq":
        prepared_of(network).remember_weights(network)
    return network


def _take_structure(network: nn.Module, said: Description) -> None:
    wiring = wiring_said_by(said, network)
    if said.scheme is None:
        if said.batchnorm == "folded":
            fold_batchnorm(network, wiring.folds)
        return
    prepared = prepare_as(network, said.scheme, wiring, fold=said.batchnorm == "folded")
    prepared.provenance = {
        "calibration": said.calibration,
        "parents": dict(said.parents),
        "trained_on": dict(said.trained_on),
    }
    apply_policy(network, said.amax)
