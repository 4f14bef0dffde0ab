"""`profile CHECKPOINT... [--engine_file FILE]`: several networks on one cloud, timed in turn.

Times of separate processes cannot be compared, so all take turns here. Those of PyTorch's fake quantization
are none of a vehicle, so each row says what runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from cpq_train.common.arm_names import DEPLOYED
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.settings import DataSettings, as_tuple
from cpq_train.profiling.interleaved import time_in_turn
from cpq_train.profiling.latency_file import (
    FAKE_IN_PYTORCH,
    FLOAT_IN_PYTORCH,
    LATENCY_FILE,
    engine_label,
    write_latency,
)
from cpq_train.profiling.report import print_in_turn, summary_line, write_files
from cpq_train.quantization.prepared import frozen
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.checkpoint_settings import stated_by
from cpq_train.verbs.profile import NUM_WARM_UP, Context, ProfiledDetector
from cpq_train.verbs.profile_input import OneCloud, ProfileSettings
from cpq_train.verbs.profile_training import check_trainable, profile_training

_COST_NOTHING = ("model.network.backbone_bn_momentum", "data.max_num_voxels_train")
"""Settings that may differ: a pass of evaluation does not have them."""


@dataclass(frozen=True)
class Timed:
    """A network that takes its turn.

    Attributes:
        detect: A pass, from voxels to boxes.
        row: What `latency.json` says of it beside its times and its name.
    """

    detect: Callable[[], Any]
    row: dict[str, Any]


def profile_several(
    data: NuScenesDataModule,
    settings: ProfileSettings,
    device: torch.device,
    precision: Context = nullcontext,
    new_trainer: Callable[..., Trainer] = Trainer,
) -> dict[str, Any]:
    """Measure checkpoints and an engine, print what they take and write what was asked for.

    Each checkpoint gets the files of `profile`, in a folder below the output that has the name of its row.

    Args:
        data: Gives the cloud, and grid and limits of voxels.
        settings: Names the files.
        device: Where to run.
        precision: The context that the trainer runs forward passes in.
        new_trainer: Makes a Trainer with the device, the precision and the clipping of the present one.

    Returns:
        The contents of `latency.json`, without the schema.

    Raises:
        UserError: The input or a file is no good, or two files differ in more than their weights.
    """
    if settings.engine_file is not None and device.type != "cpu":
        raise UserError(
            f"--engine_file {settings.engine_file} runs on the CPU, the checkpoints on {device.type}: "
            "accepted: --trainer.accelerator cpu"
        )
    models = {file: CenterPointDetector.load_from_checkpoint(file) for file in settings.checkpoints}
    if settings.training_step:
        for file, model in models.items():
            check_trainable(str(file), model)
    said = {file: _settings(model, stated_by(file)) for file, model in models.items()}
    engine = None
    if settings.engine_file is not None:
        engine = _engine(settings.engine_file)
        said[settings.engine_file] = _settings(engine, stated_by(settings.engine_file))
    _check_alike(said)
    cloud = OneCloud.of(data, settings, device)
    timed: dict[str, Timed] = {}
    trained: dict[str, CenterPointDetector] = {}
    for file, model in models.items():
        name = _free_name(model.subject.arm, timed)
        network = ProfiledDetector(model, str(file), cloud, precision)
        trained[name] = model
        timed[name] = Timed(network.detect, _row(network, _measure(network, name, settings)))
    if engine is not None:
        timed[DEPLOYED] = _timed_engine(engine, cloud)
    rows = _rows(timed, models.values(), device, settings.num_passes)
    document = {**cloud.context(settings), "rows": rows}
    print_in_turn(rows)
    if settings.output is not None:
        write_latency(settings.output / LATENCY_FILE, document)
    if settings.training_step:
        profile_training(trained, data, cloud, settings, new_trainer)
    if settings.output is not None:
        print_plain(f"Files: {settings.output}")
    return document


def _check_alike(settings: Mapping[Path, Mapping[str, Any]]) -> None:
    """Let files differ in their weights alone; what one of them does not state, it has as the others."""
    first: dict[str, tuple[Path, Any]] = {}
    for file, said in settings.items():
        for name, value in said.items():
            other, expected = first.setdefault(name, (file, value))
            if value != expected and name not in _COST_NOTHING:
                raise UserError(
                    f"{str(other)!r} and {str(file)!r} cannot be measured side by side: "
                    f"{name} is {expected} and {value}; "
                    "accepted: the same sizes of network, data settings and post-processing"
                )


def _settings(model: CenterPointDetector, data: DataSettings | None) -> dict[str, Any]:
    """What a pass depends on beside the weights, by the names of the options."""
    parts = {
        "model.network": asdict(model.network_config),
        "model.post_processing": asdict(model.post_processing),
        "data": {} if data is None else data.to_dict(),
    }
    named = {f"{part}.{name}": as_tuple(value) for part, of in parts.items() for name, value in of.items()}
    return {**named, "model.test_time_flip": model.test_time_flip}


def _free_name(arm: str, taken: Collection[str]) -> str:
    """The arm; with a number, where there are several of it."""
    names = (arm, *(f"{arm}_{number}" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)


def _measure(network: ProfiledDetector, name: str, settings: ProfileSettings) -> dict[str, Any]:
    """What a network costs beside time; its tables are written, not printed."""
    output = None if settings.output is None else settings.output / name
    found = network.profile(replace(settings, output=output))
    print_plain(f"{name}: {summary_line(found)}")
    if output is not None:
        write_files(output, found)
    return found.costs()


def _row(network: ProfiledDetector, costs: dict[str, Any]) -> dict[str, Any]:
    subject = network.model.subject
    assert network.file is not None
    return {
        "arm": subject.arm,
        "file": network.file,
        "sha256": sha256_of(network.file),
        "runs_as": FAKE_IN_PYTORCH if subject.is_quantized else FLOAT_IN_PYTORCH,
        "summary": costs,
    }


def _engine(file: Path) -> CenterPointDetector:
    """The detector that runs a deployment file."""
    return CenterPointDetector.of_engine(file)


def _timed_engine(detector: CenterPointDetector, cloud: OneCloud) -> Timed:
    engine = detector.engine
    assert engine is not None

    def detect() -> None:
        with torch.inference_mode():
            detector.detect(cloud.batch())

    row = {
        "arm": DEPLOYED,
        "file": str(engine.file),
        "sha256": engine.sha256,
        "runs_as": engine_label(engine.name, engine.version),
        "summary": {"engine_file_bytes": engine.file.stat().st_size},
    }
    return Timed(detect, row)


def _rows(
    timed: Mapping[str, Timed],
    models: Iterable[CenterPointDetector],
    device: torch.device,
    num_passes: int,
) -> list[dict[str, Any]]:
    passes = {name: one.detect for name, one in timed.items()}
    with ExitStack() as stack:
        for model in models:  # as `validate` runs them
            stack.enter_context(frozen(model.network))
        times = time_in_turn(passes, device, num_passes, NUM_WARM_UP)
    return [
        {"name": name, **one.row, **asdict(times[name].wall), "cpu_ms": times[name].cpu_ms}
        for name, one in timed.items()
    ]
