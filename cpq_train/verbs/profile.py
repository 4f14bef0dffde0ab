"""`profile`: what a detector costs by layer, on one cloud. The generic part is in `cpq_train.profiling`.

Letters: P points, V voxels, F features of a point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.data.clouds import Cloud, synthetic_cloud
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.data.dataset import points_of, voxelizer_of
from cpq_train.data.points.checks import check_cloud
from cpq_train.data.points.format import PointFormat
from cpq_train.data.sweeps import read_cloud
from cpq_train.evaluation.metrics_file import read_metrics, write_metrics
from cpq_train.evaluation.run_files import METRICS_FILE
from cpq_train.profiling.detector_parts import DETECTION_FUNCTIONS, NETWORK_FUNCTIONS
from cpq_train.profiling.instrument import observing, parts_of
from cpq_train.profiling.latency import measure_latency
from cpq_train.profiling.memory import MemoryObserver, kept_buffers, observing_memory
from cpq_train.profiling.report import Profile, print_profile, write_files
from cpq_train.profiling.storage import storage_rows
from cpq_train.profiling.trace import write_trace
from cpq_train.quantization.costs import count_costs
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.features import check_features

FIRST = "first"
NUM_WARM_UP = 1
SYNTHETIC_SEED = 0
_ORDER_SEED = 0
"""Points are shuffled as evaluation shuffles them, so that a limit on voxels leaves a mix of sweeps."""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ProfileSettings:
    """What to profile, and on what; see `QuantTrainer.profile`.

    Raises:
        UserError: They contradict one another.
    """

    output: Path | None = None
    sample: str | None = None
    cloud: Path | None = None
    num_passes: int = 5
    trace: bool = False
    checkpoints: Sequence[Path] = ()
    engine_file: Path | None = None

    def __post_init__(self) -> None:
        if self.sample is not None and self.cloud is not None:
            raise UserError(f"--sample {self.sample} and --cloud {self.cloud} are both given: expected one")
        if self.num_passes < 1:
            raise UserError(f"--num_passes is {self.num_passes}: expected 1 or more")
        if self.trace and self.output is None:
            raise UserError("--trace needs --output, the folder that trace.json is written to")
        if self.engine_file is not None and not self.checkpoints:
            raise UserError(
                f"--engine_file {self.engine_file} is measured beside checkpoints, and none is given: "
                "accepted: profile CHECKPOINT... --engine_file FILE"
            )
        files = [path.resolve() for path in self.checkpoints]
        if twice := [str(path) for path in self.checkpoints if files.count(path.resolve()) > 1]:
            raise UserError(f"{' and '.join(twice)} are one checkpoint: accepted: each file once")


@dataclass(frozen=True)
class OneCloud:
    """The voxels of a cloud on a device.

    Attributes:
        features_VF: Mean of the points of each voxel.
        coords_V3: Its z, y, x.
        num_points: P.
        device: Where they are.
        points: How points were read.
    """

    features_VF: Tensor
    coords_V3: Tensor
    num_points: int
    device: torch.device
    points: PointFormat

    @classmethod
    def of(cls, data: NuScenesDataModule, settings: ProfileSettings, device: torch.device) -> Self:
        """Of the cloud that is asked for.

        Raises:
            UserError: There is none.
        """
        points = _points(data, settings)
        order = np.random.default_rng(_ORDER_SEED).permutation(len(points))
        features_VF, coords_V3, _ = voxelizer_of(data.evaluation_config)(points, order)
        how = data.evaluation_config.points
        return cls(features_VF.to(device), coords_V3.to(device), len(points), device, how)

    def batch(self) -> dict[str, Any]:
        """What a detector takes."""
        batch_column = torch.zeros_like(self.coords_V3[:, :1])
        return {
            "voxel_features": self.features_VF,
            "voxel_coords": torch.cat([batch_column, self.coords_V3], dim=1),
            "batch_size": 1,
        }

    def context(self, settings: ProfileSettings) -> dict[str, Any]:
        """What is measured on, as plain values."""
        on_cuda = self.device.type == "cuda"
        return {
            "input": str(settings.cloud or settings.sample or "synthetic"),
            "num_points": self.num_points,
            "num_voxels": len(self.coords_V3),
            "device": torch.cuda.get_device_name(self.device) if on_cuda else "cpu",
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_passes": settings.num_passes,
        }


class ProfiledDetector:
    """A detector and one cloud on a device, and the passes that are measured.

    Args:
        model: The detector, built.
        file: Where its weights are from; None where they are fresh.
        cloud: What to run on, and where.
        precision: The context that the trainer runs forward passes in.
    """

    def __init__(
        self,
        model: CenterPointDetector,
        file: str | None,
        cloud: OneCloud,
        precision: Context = nullcontext,
    ) -> None:
        self._cloud, self._precision = cloud, precision
        self.device, self.file = cloud.device, file
        check_features(model.network_config, cloud.points)
        self.model = model.to(cloud.device).eval()
        self.network = model.network
        self.is_calibrated_here = model.subject.needs_calibration
        if self.is_calibrated_here:
            with collecting_ranges(self.network, lambda problems: None):
                model(cloud.batch())

    @torch.inference_mode()
    def detect(self) -> None:
        """From voxels to boxes."""
        with self._precision():
            self.model.detect(self._cloud.batch())

    def train(self) -> list[dict[str, Tensor]]:
        """The forward pass of training, its outputs with all that backward needs."""
        with self._precision():
            heads: list[dict[str, Tensor]] = self.model(self._cloud.batch())
            return heads

    def profile(self, settings: ProfileSettings) -> Profile:
        """Measure everything."""
        observe = partial(observing, self.network, functions=DETECTION_FUNCTIONS)
        macs = self._macs()
        latency = measure_latency(self.detect, observe, self.device, macs, settings.num_passes, NUM_WARM_UP)
        evaluation = self._memory(self.detect)
        self.model.train()
        with kept_buffers(self.network):
            training = self._memory(self.train)
        self.model.eval()
        if settings.trace:
            assert settings.output is not None
            settings.output.mkdir(parents=True, exist_ok=True)
            write_trace(settings.output / "trace.json", self.detect, observe)
        return Profile(
            self._context(settings),
            str(self.network),
            latency,
            training.rows(),
            training.peak_bytes(),
            evaluation.peak_bytes(),
            storage_rows(self.network),
        )

    def _macs(self) -> dict[str, float]:
        layers = [name for name, part in parts_of(self.network).items() if part.is_layer]

        def run() -> int:
            self.detect()
            return 1

        return {name: cost.num_macs for name, cost in count_costs(self.network, layers, run).items()}

    def _memory(self, run: Callable[[], Any]) -> MemoryObserver:
        with observing_memory(self.network, self.device, NETWORK_FUNCTIONS) as observer:
            outputs = run()
            observer.finish()
            del outputs
        return observer

    def _context(self, settings: ProfileSettings) -> dict[str, Any]:
        subject = self.model.subject
        return {
            "arm": subject.arm,
            "scheme": None if subject.scheme is None else subject.scheme.name,
            "weights": self.file or "untrained",
            "ranges_from_this_input": self.is_calibrated_here,
            **self._cloud.context(settings),
        }


def profile(
    model: CenterPointDetector,
    data: NuScenesDataModule,
    settings: ProfileSettings,
    device: torch.device,
    precision: Context = nullcontext,
) -> Profile:
    """Measure a detector, print it and write what was asked for.

    Raises:
        UserError: The input or the checkpoint is no good.
    """
    cloud = OneCloud.of(data, settings, device)
    if model.weights is None:
        model.start_untrained()
    else:
        model.configure_model()
    found = ProfiledDetector(model, model.weights, cloud, precision).profile(settings)
    print_profile(found)
    if settings.output is not None:
        write_files(settings.output, found)
        if model.weights is not None:
            _add_to_scores(settings.output, model.weights, found)
        print_plain(f"Files: {settings.output}")
    return found


def _add_to_scores(folder: Path, weights: str, found: Profile) -> None:
    """Where the folder is a run that scored this very checkpoint, its metrics.json gets what was measured."""
    path = folder / METRICS_FILE
    if not path.exists():
        return
    document = read_metrics(path)
    if document["checkpoint"]["sha256"] == sha256_of(weights):
        write_metrics(path, {**document, "profile": {**document["profile"], **found.summary()}})


def _points(data: NuScenesDataModule, settings: ProfileSettings) -> Cloud:
    config = data.evaluation_config
    if settings.cloud is not None:
        check_cloud(settings.cloud, config.points)
        return read_cloud(settings.cloud, points=config.points)
    if settings.sample is None:
        return synthetic_cloud(config.num_sweeps, SYNTHETIC_SEED, config.points)
    data.prepare_data()
    is_first = settings.sample == FIRST
    rows = data.eval_rows if is_first else data.index.sample_rows(None, [settings.sample])
    return points_of(data.index, int(rows[0]), config)
