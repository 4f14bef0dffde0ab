"""`profile`: what a detector costs by layer, on one cloud. The generic part is in `cpq_train.profiling`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from cpq_train.common.console import print_plain
from cpq_train.common.files import sha256_of
from cpq_train.data.datamodule import NuScenesDataModule
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
from cpq_train.quantization.prepared import frozen
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.training.detector import CenterPointDetector
from cpq_train.training.features import check_features
from cpq_train.verbs.profile_input import OneCloud, ProfileSettings
from cpq_train.verbs.profile_training import check_trainable, profile_training

NUM_WARM_UP = 1

Context = Callable[[], AbstractContextManager[Any]]


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
        with frozen(self.network):  # as `validate` runs it
            passes = self.detect, observe, self.device, macs, settings.num_passes, NUM_WARM_UP
            latency = measure_latency(*passes)
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
    new_trainer: Callable[..., Trainer] = Trainer,
) -> Profile:
    """Measure a detector, print it and write what was asked for.

    Args:
        model: The detector.
        data: Gives the cloud, and training batches.
        settings: What to measure.
        device: Where to run.
        precision: The context that the trainer runs forward passes in.
        new_trainer: Makes a Trainer with the device, the precision and the clipping of the present one.

    Raises:
        UserError: The input or the checkpoint is no good.
    """
    cloud = OneCloud.of(data, settings, device)
    if model.weights is None:
        model.start_untrained()
    else:
        model.configure_model()
    if settings.training_step:
        check_trainable("the network", model)
    found = ProfiledDetector(model, model.weights, cloud, precision).profile(settings)
    print_profile(found)
    if settings.output is not None:
        write_files(settings.output, found)
        if model.weights is not None:
            _add_to_scores(settings.output, model.weights, found)
    if settings.training_step:
        profile_training({model.subject.arm: model}, data, cloud, settings, new_trainer)
    if settings.output is not None:
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
