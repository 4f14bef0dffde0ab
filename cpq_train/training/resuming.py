"""Whether a checkpoint is one that a fit can go on from as it began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpq_train.arms.description import Description
from cpq_train.arms.scheme_difference import scheme_difference
from cpq_train.arms.state import check_finite
from cpq_train.common.errors import UserError
from cpq_train.models import NetworkConfig
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.training.settings import hyper_parameters, scheme_of


def check_same_run(asked: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Refuse to resume with settings that the checkpoint's structure has decided otherwise.

    Args:
        asked: The detector's settings, plain values; what is None is left to the checkpoint.
        checkpoint: Content of the checkpoint that the run goes on from.
        path: For messages.

    Raises:
        UserError: It is no checkpoint of a fit; or arm, scheme, BatchNorm, ranges or sizes of the network
            differ, and each difference.
    """
    if not {"optimizer_states", "loops"} <= checkpoint.keys():
        raise UserError(
            f"checkpoint {str(path)!r} holds no state of training to go on from; "
            "a fit starts from it as model.weights"
        )
    said, began = Description.of(checkpoint, path), hyper_parameters(checkpoint, path)
    ranges = began.get("ranges") if said.arm == "qat" else None
    lines = [
        *_differences("arm", said.arm, asked["arm"]),
        *_differences("batchnorm", said.batchnorm, asked["batchnorm"]),
        *_differences("network", _whole(NetworkConfig, began.get("network")), asked["network"]),
        *_differences("ranges", _whole(RangePolicy, ranges), asked["ranges"]),
        *_scheme_differences(said, began.get("scheme"), asked["scheme"]),
    ]
    if lines:
        text = "\n".join(lines)
        raise UserError(
            f"checkpoint {str(path)!r} belongs to a run with other settings, and a run goes on as it began; "
            f"to begin another one start from model.weights:\n{text}"
        )


def _whole(kind: type[Any], settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Settings with the defaults of those that an older file does not hold."""
    return None if settings is None else asdict(kind(**settings))


def _differences(name: str, of_checkpoint: Any, asked: Any) -> Iterator[str]:
    """A line for each value that both have and that differs."""
    if isinstance(asked, Mapping) and isinstance(of_checkpoint, Mapping):
        for key, value in asked.items():
            yield from _differences(f"{name}.{key}", of_checkpoint.get(key), value)
    elif None not in (asked, of_checkpoint) and asked != of_checkpoint:
        yield f"  model.{name}: checkpoint {of_checkpoint}, now {asked}"


def _scheme_differences(said: Description, began: str | None, asked: str | None) -> Iterator[str]:
    scheme = None if said.scheme is None else scheme_of(asked, began)
    if scheme is None or said.scheme is None:
        return
    if difference := scheme_difference(scheme, said.scheme, said.calibration):
        yield f"  model.scheme is {asked!r}:"
        yield difference


def check_optimizer_state(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Look at what the optimizers remember: one NaN there is one in the weights after a step.

    Raises:
        UserError: A tensor of theirs holds NaN or infinite numbers.
    """
    moments = {
        f"optimizer.{number}.{name}": value
        for optimizer in checkpoint.get("optimizer_states", ())
        for number, of_parameter in optimizer["state"].items()
        for name, value in of_parameter.items()
    }
    check_finite(moments, f"checkpoint {str(path)!r}")
