"""What a command leaves to the checkpoint and to the configuration files that it names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.data.points.format import PointFormat
from cpq_train.data.settings import DATA_KEY, OF_POINTS, DataSettings, as_tuple
from cpq_train.export.names import ENGINE_SUFFIX
from cpq_train.export.sidecar import read_sidecar
from cpq_train.models import NetworkConfig
from cpq_train.resilience.resume import newest_checkpoint
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.features import OPTION, check_features
from cpq_train.training.settings import DECIDED_BY_FILE, settings_of
from cpq_train.verbs.given import Given

DECIDED_BY_STRUCTURE = ("network", "arm", "scheme", "batchnorm", "ranges")
"""Settings of the model that a run cannot change when it is resumed: `training.resuming` compares them."""

_STATED_NOWHERE_ELSE = ("num_sweeps", "max_points_per_voxel", "max_num_voxels_eval")
"""Settings of the data that old checkpoints do not hold; the grid is among those of the network."""

GRID = ("voxel_size", "point_cloud_range")
"""Settings that the data have from `model.network`."""


def keep_what_was_asked(config: Namespace, asked: Namespace, given: Given) -> None:
    """Have a fit compared with the checkpoint that it resumes: Lightning lets that one's settings win."""
    for name in DECIDED_BY_STRUCTURE:
        _keep(config.model, asked.model, name, f"model.{name}", given)
    if asked.model.scheme is None:  # the checkpoint's own, whatever the file of that name says by now
        config.model.scheme = None


def _keep(config: Namespace, asked: Namespace, key: str, name: str, given: Given) -> None:
    value = asked[key]
    if isinstance(value, Namespace) and isinstance(config[key], Namespace):
        for inner in vars(value):
            _keep(config[key], value, inner, f"{name}.{inner}", given)
    elif name in given and value is not None:
        config[key] = value


def leave_to_engine(config: Namespace, given: Given) -> None:
    """Let an engine of the command line take the place of the weights that a configuration names.

    Raises:
        UserError: The command line asks for what the engine's file says itself.
    """
    model = config.model
    if model.engine_file is None:
        return
    for name in DECIDED_BY_FILE:
        if model[name] is not None and given.on_command_line(f"model.{name}"):
            raise UserError(
                f"--model.{name} {model[name]} beside model.engine_file {model.engine_file!r}: what the file "
                "is, it says itself"
            )
    if given.on_command_line("model.engine_file") and not given.on_command_line("model.weights"):
        model.weights = None


def leave_out_parts(config: Namespace, given: Given) -> list[str]:
    """Let parts go with the weights that they were said of: those of a fit are none of what it made.

    Returns:
        A sentence, where the configuration of such a fit meets other weights.
    """
    parts = config.model.weights_parts
    if parts is None or given.place_of("model.weights_parts") >= given.place_of("model.weights"):
        return []
    config.model.weights_parts = None
    return [
        f"model.weights_parts {parts} is left out: it was said of other weights than "
        f"{config.model.weights!r}, which are taken whole; to take parts of them, say so where they are named"
    ]


def find_scheme(config: Namespace, given: Given) -> None:
    """Look for a scheme file that is not there beside the configuration that names it, too."""
    scheme = config.model.scheme
    if scheme is None or Path(scheme).is_file():
        return
    file = given.file_that_says("model.scheme", scheme)
    if file is not None and (file.parent / scheme).is_file():
        config.model.scheme = str(file.parent / scheme)


def take_data_settings(config: Namespace, given: Given) -> list[str]:
    """Let the data be as they were for the checkpoint, where nothing else is given.

    Returns:
        A sentence for each thing that a person should know: settings that differ, or that nobody states.
    """
    paths = files_of(config)
    if config.get("checkpoints"):
        _take_grid(config, paths[0])
    path, stated = next(((path, said) for path in paths if (said := stated_by(path))), (None, None))
    if path is None or stated is None:
        return _assumed(paths[0], config, given) if paths else []
    differences = []
    for name, value in stated.to_dict().items():
        if name not in GRID and f"data.{name}" not in given:
            config.data[name] = value
        elif as_tuple(config.data[name]) != value:
            differences.append(f"data.{name} is {config.data[name]}; {_named(path)} was made with {value}")
    return differences


def follow_features(config: Namespace, given: Given) -> None:
    """Let the network take what the points have, where its number of features is not set.

    Raises:
        UserError: It is set to another number.
    """
    if config.get("checkpoints"):  # which are measured as they are
        return
    data, network = config.data, config.model.network
    points = PointFormat(tuple(data.point_columns), data.intensity_scale)
    is_set = OPTION in given or config.get("ckpt_path") not in (None, "last")
    if not is_set:
        network.num_point_features = len(points.features)
    check_features(NetworkConfig(num_point_features=network.num_point_features), points)


def _named(path: Path) -> str:
    return f"{'engine file' if path.suffix == ENGINE_SUFFIX else 'checkpoint'} {str(path)!r}"


def stated_by(path: Path) -> DataSettings | None:
    """What a checkpoint, or the sidecar of a deployment file, says of its data."""
    if path.suffix == ENGINE_SUFFIX:
        return DataSettings.of({DATA_KEY: read_sidecar(path).data}, path)
    return DataSettings.of(read_checkpoint(path, mmap=True), path)


def files_of(config: Namespace) -> list[Path]:
    """What a command runs or goes on from: a checkpoint, a deployment file, or what `profile` compares."""
    if side_by_side := config.get("checkpoints"):
        return list(side_by_side)
    named = config.get("ckpt_path")
    if named == "last":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the run chooses
            named = newest_checkpoint(Path(config.trainer.default_root_dir) / "checkpoints")
    files = (config.model.engine_file, named, config.model.weights)
    return [Path(one) for one in files if one and Path(one).is_file()][:1]


def _take_grid(config: Namespace, path: Path) -> None:
    """The grid of a checkpoint that is measured as it is: `model.network` has no part in it then."""
    content = read_checkpoint(path, mmap=True)
    own = settings_of(content, path, CenterPointDetector)
    network = own.get("network") or NetworkConfig()
    for name in GRID:
        config.data[name] = getattr(network, name)


def _assumed(path: Path, config: Namespace, given: Given) -> list[str]:
    ordinary = {*GRID, *OF_POINTS}
    names = [
        name for name in DataSettings().to_dict() if name not in ordinary and f"data.{name}" not in given
    ]
    taken = ", ".join(f"data.{name} {config.data[name]}" for name in names)
    said = f"checkpoint {str(path)!r} does not say with what data settings it was made: taking {taken}"
    return [said] if names else []


def data_settings_of(content: Mapping[str, Any], path: Path, network: NetworkConfig) -> DataSettings:
    """What a checkpoint was made with, on its network's grid, for verbs without a configuration of the data.

    A checkpoint that says nothing of its data gets the defaults, and the console says so.

    Args:
        content: Of the checkpoint.
        path: For messages.
        network: Its sizes.
    """
    stated = DataSettings.of(content, path)
    if stated is None:
        stated = DataSettings()
        taken = ", ".join(f"{name} {getattr(stated, name)}" for name in _STATED_NOWHERE_ELSE)
        print_plain(
            f"checkpoint {str(path)!r} does not say with what data settings it was made: taking {taken}",
            style="yellow",
        )
    return replace(stated, voxel_size=network.voxel_size, point_cloud_range=network.point_cloud_range)
