"""Where the network and quantization meet: the structure of each arm, and how a checkpoint becomes one.

float: BatchNorm trains, nothing is quantized. float_tuned: BatchNorm as in qat, no quantizers: the control
that says what more training alone brings. ptq, qat: layers quantized as the scheme says, BatchNorm folded, or
kept frozen or trained and folded behind training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from cpq_train.arms.recipe import amax_policy, recipe, same_scheme
from cpq_train.common.checkpoint import (
    NETWORK_PREFIX,
    network_state,
    read_checkpoint,
    sha256_of,
    write_checkpoint,
)
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.models.topology import bev_levels, hidden_convolutions, names_of, residual_blocks
from cpq_train.quantization.batchnorm import BatchNormPolicy, fold_batchnorm
from cpq_train.quantization.health import refuse
from cpq_train.quantization.prepare import RESIDUAL, Prepared, prepare, unquantized
from cpq_train.quantization.ranges.calibration import AMAX, is_calibrated, problems_of_state
from cpq_train.quantization.ranges.policy import AmaxPolicy, apply_policy
from cpq_train.quantization.scheme import Scheme

Arm = Literal["float", "float_tuned", "ptq", "qat"]


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
    def has_float_weights(self) -> bool:
        """Whether the weights, quantizers off, are those of the float checkpoint it came from."""
        return not (self.is_tuned or _changed_weights(self.calibration))

    def describe(self) -> dict[str, Any]:
        """The `quantization` entry of its checkpoint."""
        return recipe(
            self.arm, self.scheme, self.prepared, self.batchnorm, self.amax, self.calibration, self.parents
        )


def build(
    config: NetworkConfig, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None = None
) -> Subject:
    """A network with fresh weights in the structure of `arm`; activation ranges are NaN.

    Raises:
        UserError: A quantized arm without a scheme.
    """
    return _restructure(CenterPoint(config), arm, scheme, batchnorm)


def from_description(config: NetworkConfig, description: Mapping[str, Any]) -> Subject:
    """The structure that a checkpoint's `quantization` entry describes, its state not loaded yet."""
    scheme = None if description["scheme"] is None else Scheme.from_dict(description["scheme"], "checkpoint")
    subject = build(config, description["arm"], scheme, description["batchnorm"])
    set_range_policy(subject, amax_policy(description))
    subject.calibration = description["calibration"]
    subject.parents = dict(description["parents"])
    subject.is_tuned = subject.arm in ("float_tuned", "qat")
    return subject


def set_range_policy(subject: Subject, amax: AmaxPolicy) -> None:
    """Say what becomes of the ranges in training; learned ones become parameters."""
    subject.amax = amax
    apply_policy(subject.network, amax)


def from_weights(
    config: NetworkConfig,
    path: str | Path,
    arm: Arm | None,
    scheme: Scheme | None,
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
        UserError: The checkpoint is unreadable, of another architecture, of an arm that cannot become `arm`,
            its scheme differs from `scheme`, its BatchNorm is folded and `batchnorm` would keep it, or its
            calibration changed the weights that float_tuned would start from.
    """
    checkpoint = read_checkpoint(path)
    description = checkpoint["quantization"]
    source: Arm = description["arm"]
    target: Arm = arm or source
    _check_descent(source, target, path)
    state = network_state(checkpoint)
    quantized_source = source in ("ptq", "qat")
    if source == target or (quantized_source and target in ("ptq", "qat")):
        subject = from_description(config, description)
        _check_scheme(subject, scheme, path)
        _load(subject.network, state, path)
        subject.arm = target
        _change_batchnorm(subject, batchnorm, path)
    elif quantized_source:
        if _changed_weights(description["calibration"]):
            raise UserError(
                f"model.arm {target!r} cannot start from {str(path)!r}: its calibration changed the weights "
                "(model.calibration); start from the float checkpoint"
            )
        subject = build(config, target, None, description["batchnorm"])
        _load(subject.network, {k: v for k, v in state.items() if not k.endswith("_amax")}, path)
        _change_batchnorm(subject, batchnorm, path)
    else:
        network = CenterPoint(config)
        _load(network, state, path)
        subject = _restructure(network, target, scheme, batchnorm)
    subject.parents = {**description["parents"]}
    if source != target:
        subject.parents[source] = sha256_of(path)
    return subject


def _changed_weights(calibration: Mapping[str, Any] | None) -> bool:
    keys = ("bias_correction", "adaround_num_steps")
    return calibration is not None and any(calibration.get(key) for key in keys)


def is_quantized(subject: Subject) -> bool:
    """Whether the subject has quantizers."""
    return subject.scheme is not None


def needs_calibration(subject: Subject) -> bool:
    """Whether activation ranges are still missing."""
    return is_quantized(subject) and not is_calibrated(subject.network)


def fold_checkpoint(config: NetworkConfig, path: str | Path, output: str | Path) -> None:
    """Write a checkpoint of the same network with BatchNorm folded; it holds no state of training.

    Args:
        config: Sizes of the network.
        path: A float_tuned, ptq or qat checkpoint of this project.
        output: Where to.
    """
    subject = from_weights(config, path, None, None, "folded")
    state = {NETWORK_PREFIX + name: tensor for name, tensor in subject.network.state_dict().items()}
    kept = ("epoch", "global_step", "hyper_parameters", "pytorch-lightning_version")
    checkpoint = {key: value for key, value in read_checkpoint(path).items() if key in kept}
    write_checkpoint({**checkpoint, "state_dict": state, "quantization": subject.describe()}, output)


def _restructure(
    network: CenterPoint, arm: Arm, scheme: Scheme | None, batchnorm: BatchNormPolicy | None
) -> Subject:
    if arm == "float":
        if batchnorm not in (None, "trained"):
            raise UserError(f"model.batchnorm is {batchnorm!r}; accepted for arm 'float': trained")
        return Subject(network, arm, unquantized(network), batchnorm="trained")
    batchnorm = batchnorm or "folded"
    if arm == "float_tuned":
        if batchnorm == "folded":
            fold_batchnorm(network)
        return Subject(network, arm, unquantized(network), batchnorm=batchnorm)
    if scheme is None:
        raise UserError(f"arm {arm!r} needs model.scheme, a scheme file such as configs/schemes/int8.yaml")
    prepared = prepare(network, scheme, tensors_read_together(network), fold=batchnorm == "folded")
    return Subject(network, arm, prepared, scheme, batchnorm)


def _change_batchnorm(subject: Subject, asked: BatchNormPolicy | None, path: str | Path) -> None:
    if asked is None or asked == subject.batchnorm:
        return
    if subject.batchnorm == "folded" or subject.arm == "float":
        raise UserError(
            f"model.batchnorm is {asked!r}, but the BatchNorm of {str(path)!r} is {subject.batchnorm}; "
            f"accepted: {subject.batchnorm}"
        )
    if asked == "folded":
        fold_batchnorm(subject.network)
    subject.batchnorm = asked


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


def _check_descent(source: Arm, target: Arm, path: str | Path) -> None:
    allowed: dict[Arm, tuple[Arm, ...]] = {
        "float": ("float", "float_tuned", "ptq", "qat"),
        "float_tuned": ("float_tuned",),
        "ptq": ("ptq", "qat", "float_tuned"),
        "qat": ("qat",),
    }
    if target not in allowed[source]:
        raise UserError(
            f"model.arm {target!r} cannot start from {str(path)!r}, which is {source!r}; "
            f"from there: {', '.join(allowed[source])}"
        )


def _check_scheme(subject: Subject, asked: Scheme | None, path: str | Path) -> None:
    of_checkpoint = subject.scheme
    if asked is None or of_checkpoint is None:
        return
    if asked.on_unfit_range == "float":
        asked = asked.with_float((subject.calibration or {}).get("left_in_float", ()))
    if same_scheme(asked, of_checkpoint):
        return
    mine, theirs = _settings(asked.to_dict()), _settings(of_checkpoint.to_dict())
    lines = [
        f"  {key}: checkpoint {theirs.get(key, 'none')}, model.scheme {mine.get(key, 'none')}"
        for key in {**theirs, **mine}
        if mine.get(key) != theirs.get(key) and key != "name"
    ]
    raise UserError(f"checkpoint {str(path)!r} was calibrated with another scheme:\n" + "\n".join(lines))


def _settings(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value of every single setting; rules are numbered from 1."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        children = [(str(i), entry) for i, entry in enumerate(value, 1)]
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, child in children:
        found |= _settings(child, f"{name}.{key}".lstrip("."))
    return found


def _load(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    check_state(network, state, path)
    network.load_state_dict(dict(state))


def check_state(network: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Compare a checkpoint's tensors with those of the network, by name and shape, and look at its ranges.

    Raises:
        UserError: They differ, and how many are missing, unexpected or of another shape; or ranges are
            missing or unfit, with a table of them.
    """
    problems = problems_of_state(network, state)
    unfit = {problem.quantizer + AMAX for problem in problems}
    own = {name: tensor for name, tensor in network.state_dict().items() if name not in unfit}
    state = {name: tensor for name, tensor in state.items() if name not in unfit}
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(state))
        if state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        parts = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        text = "; ".join(f"{len(names)} {what} ({_some(names)})" for names, what in parts if names)
        raise UserError(f"checkpoint {str(path)!r} is of another architecture than model.network: {text}")
    refuse(problems, f"checkpoint {str(path)!r}: ")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
