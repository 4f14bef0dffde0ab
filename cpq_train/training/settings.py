"""The detector's settings as a checkpoint holds them (plain values), and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from cpq_train.arms.starting_point import CalibrationConfig
from cpq_train.common.errors import UserError
from cpq_train.models import NetworkConfig
from cpq_train.models.decode import PostProcessing
from cpq_train.models.distillation import DistillationConfig
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.quantization.scheme import Scheme
from cpq_train.training.optim import OptimizerConfig

HYPER_PARAMETERS = "hyper_parameters"
"""Lightning's name of the entry of a checkpoint."""

DECIDED_BY_FILE = ("arm", "scheme", "batchnorm")
"""Settings of the model that a checkpoint, or a deployment file, has itself."""

_CLASSES: dict[str, type[Any]] = {
    "network": NetworkConfig,
    "ranges": RangePolicy,
    "post_processing": PostProcessing,
    "optimizer": OptimizerConfig,
    "calibration": CalibrationConfig,
    "distillation": DistillationConfig,
}
"""Settings that are more than one value."""


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as tensors-and-plain-values files hold them."""
    return {name: asdict(value) if is_dataclass(value) else value for name, value in settings.items()}  # type: ignore[arg-type]


def scheme_of(file: str | None, made_with: str | None) -> Scheme | None:
    """The scheme that `model.scheme` names.

    Args:
        file: The YAML file; None where none is named.
        made_with: The one that the checkpoint at hand names: that one may be gone, the checkpoint holds it.

    Returns:
        None where the checkpoint's own scheme is meant.

    Raises:
        UserError: The file does not exist, or is no scheme.
    """
    if file is None or (_is_named_in(file, made_with) and not Path(file).is_file()):
        return None
    return Scheme.from_file(file)


def _is_named_in(file: str, made_with: str | None) -> bool:
    """Whether a path is the end of another, as where a file was found beside its configuration."""
    parts = Path(file).parts
    return made_with is not None and Path(made_with).parts[-len(parts) :] == parts


def hyper_parameters(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint's settings, plain values; none where it holds none.

    Raises:
        UserError: The entry is something else.
    """
    found = checkpoint.get(HYPER_PARAMETERS, {})
    if not isinstance(found, Mapping):
        raise UserError(f"checkpoint {str(path)!r}: {HYPER_PARAMETERS} is {found!r}; expected a mapping")
    return dict(found)


def settings_of(checkpoint: Mapping[str, Any], path: str | Path, accepted: Collection[str]) -> dict[str, Any]:
    """Arguments of a detector from a checkpoint; what it does not hold has its default.

    Args:
        checkpoint: Its content.
        path: For messages.
        accepted: Names of the detector's arguments.

    Raises:
        UserError: It holds a setting that this release does not know, or a value that it does not accept.
    """
    settings = hyper_parameters(checkpoint, path)
    if unknown := sorted(map(str, settings.keys() - set(accepted))):
        raise UserError(
            f"checkpoint {str(path)!r}, {HYPER_PARAMETERS}: {', '.join(unknown)} unknown; "
            f"accepted: {', '.join(accepted)}"
        )
    for name, kind in _CLASSES.items():
        if settings.get(name) is not None:
            try:
                settings[name] = kind(**settings[name])
            except TypeError as error:
                raise UserError(f"checkpoint {str(path)!r}, {HYPER_PARAMETERS}.{name}: {error}") from error
    return settings
