"""The detector's settings as a checkpoint holds them (plain values), and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from lightning.pytorch.utilities import rank_zero_warn
from pydantic import TypeAdapter
from typing_extensions import NotRequired

from cpq_train.arms.starting_point import CalibrationConfig
from cpq_train.common.errors import UserError, shown
from cpq_train.common.schema import keys, validated_plain
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

NUM_SHOWN = 3

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
        raise UserError(f"checkpoint {str(path)!r}: {HYPER_PARAMETERS} is {shown(found)}; expected a mapping")
    return dict(found)


def settings_of(checkpoint: Mapping[str, Any], path: str | Path, detector: type) -> dict[str, Any]:
    """Arguments of a detector from a checkpoint; what it does not hold has its default.

    Args:
        checkpoint: Its content.
        path: For messages.
        detector: The class; the types of its arguments are what the settings are checked against.

    Raises:
        UserError: It holds a setting that this release does not know, or a value that it does not accept.
    """
    settings = hyper_parameters(checkpoint, path)
    where = f"checkpoint {str(path)!r}, {HYPER_PARAMETERS}"
    kinds = get_type_hints(vars(detector)["__init__"])
    del kinds["return"]
    _check_known(settings, kinds, where)
    for name, kind in _CLASSES.items():
        if isinstance(settings.get(name), Mapping):
            _check_known(settings[name], [field.name for field in fields(kind)], f"{where}.{name}")
    return validated_plain(_type_of(tuple(kinds.items())), settings, where)


def _check_known(settings: Mapping[str, Any], accepted: Collection[str], where: str) -> None:
    if unknown := sorted(shown(name) for name in settings if name not in accepted):
        raise UserError(f"{where}: {', '.join(unknown[:NUM_SHOWN])} unknown; accepted: {', '.join(accepted)}")


@cache
def _type_of(kinds: tuple[tuple[str, Any], ...]) -> TypeAdapter[dict[str, Any]]:
    """What settings should be, from the types of the arguments that they are for; any may be missing."""
    return TypeAdapter(keys({name: NotRequired[kind] for name, kind in kinds}))


def reaching(post: PostProcessing, network: NetworkConfig) -> PostProcessing:
    """With the center range that null stands for; one that is set and loses boxes is told."""
    reaching = post.reaching(network.point_cloud_range)
    widest = replace(post, center_range=None).reaching(network.point_cloud_range)
    if any(
        abs(own) < abs(least)
        for own, least in zip(reaching.center_range or (), network.point_cloud_range, strict=False)
    ):
        rank_zero_warn(
            f"model.post_processing.center_range is {reaching.center_range}, less than point_cloud_range "
            f"{network.point_cloud_range}: boxes beyond are dropped; null is {widest.center_range}"
        )
    return reaching
