"""A prepared network in a checkpoint that says what it is, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cpq_train.arms.description import Description
from cpq_train.arms.loading import take_tensors
from cpq_train.arms.said_wiring import wiring_said_by
from cpq_train.arms.state import check_numbers, check_state
from cpq_train.common.checkpoint import (
    NETWORK_PREFIX,
    NOT_TRAINED,
    checked,
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
    example input. Its arm is `ptq` while weights, learned ranges and statistics of BatchNorm are those that
    were calibrated, `qat` afterwards.

    Args:
        network: What `prepare` made.
        path: Where to; appears only once it is whole.

    Raises:
        UserError: The network is not prepared, a range is missing or unfit, a weight is NaN or infinite, or
            the network's state holds other things than dense tensors.
    """
    prepared = prepared_of(network)
    check_ranges(network)
    said = Description(
        arm="qat" if prepared.is_tuned(network) else "ptq",
        scheme=prepared.scheme,
        batchnorm="trained" if kept_batchnorms(network, prepared.folds) else "folded",
        amax="learned" if range_parameters(network) else "frozen",
        wiring=prepared.wiring,
        network_class=None if isinstance(network, CenterPoint) else type(network).__name__,
        **prepared.provenance,
    )
    content = {**NOT_TRAINED, "state_dict": _state(network), "quantization": said.entry(prepared)}
    if isinstance(network, CenterPoint):
        content[HYPER_PARAMETERS] = {"network": asdict(network.config)}
    checked(content, path)
    check_numbers(network, network_state(content), f"checkpoint {str(path)!r}")
    write_checkpoint(content, path)


def _state(network: nn.Module) -> dict[str, Any]:
    """The network's state on the CPU, as a checkpoint names it."""
    state: Mapping[str, Any] = network.state_dict()  # modules may add what is no tensor
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
    return {NETWORK_PREFIX + name: value for name, value in on_cpu.items()}


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
    for each in (copy.deepcopy(network), network):  # what fails, fails on the copy
        _fill(each, said, state, path)
    return network


def _fill(network: nn.Module, said: Description, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Give a float network the structure and the tensors of a checkpoint."""
    wiring = wiring_said_by(said, network, path, "the network")
    if said.scheme is not None:
        prepare_as(network, said.scheme, wiring, fold=said.batchnorm == "folded")
        apply_policy(network, said.amax)
    elif said.batchnorm == "folded":
        fold_batchnorm(network, wiring.folds)
    check_state(network, state, path, "the network")
    take_tensors(network, said, state)
    check_biases(network, f"checkpoint {str(path)!r}: ")
