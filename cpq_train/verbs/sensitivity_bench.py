"""Networks of one float checkpoint, quantized as asked and scored on the same few samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cpq_train.common.arm_names import Arm
from cpq_train.common.errors import UserError
from cpq_train.common.files import sha256_of
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.models import CenterPoint, HeadOutput
from cpq_train.models.divergence import output_distance
from cpq_train.quantization.bits.bit_plan import write_scheme
from cpq_train.quantization.bits.sensitivity import Scores
from cpq_train.quantization.costs import LayerCost, count_costs
from cpq_train.quantization.scheme import Scheme
from cpq_train.training.detector import Batch, CenterPointDetector
from cpq_train.training.scoring import score_detector


class SensitivityBench:
    """Prepares networks and scores them.

    Args:
        model: Names the float checkpoint and the settings of the run.
        data: Gives the calibration samples, and the validation samples for `score_detections`.
        num_samples: Training samples, drawn as the calibration samples are, on which outputs are compared.
        score_detections: Whether scores include mAP and NDS.
        folder: Where the schemes that were measured are kept, ready for `calibrate`.
        device: Where networks run.

    Raises:
        UserError: The checkpoint is not of a float network, or there are not so many samples.
    """

    def __init__(
        self,
        model: CenterPointDetector,
        data: NuScenesDataModule,
        num_samples: int,
        score_detections: bool,
        folder: Path,
        device: torch.device,
    ) -> None:
        if not 1 <= num_samples <= data.num_calibration_samples:
            raise UserError(
                f"--num_samples is {num_samples}: expected 1 to data.num_calibration_samples, "
                f"which is {data.num_calibration_samples}"
            )
        self._model, self._data, self._folder, self._device = model, data, folder, device
        self._num_samples, self._score_detections = num_samples, score_detections
        self._reference = self._detector("float", None)

    @property
    def float_network(self) -> CenterPoint:
        """The network of the checkpoint."""
        return self._reference.network

    @cached_property
    def _batches(self) -> list[Batch]:
        few = copy.copy(self._data)
        few.num_calibration_samples = self._num_samples
        return [self._reference.to_device(batch) for batch in few.calibration_dataloader()]

    @cached_property
    def _reference_heads(self) -> list[list[HeadOutput]]:
        return self._heads(self._reference)

    @torch.no_grad()
    def _heads(self, detector: CenterPointDetector) -> list[list[HeadOutput]]:
        return [detector(batch) for batch in self._batches]

    def costs(self, layers: Iterable[str]) -> dict[str, LayerCost]:
        """Weights of each layer, and its MACs per sample."""

        def run() -> int:
            self._heads(self._reference)
            return self._num_samples

        return count_costs(self.float_network, layers, run)

    def prepare(self, scheme: Scheme) -> tuple[nn.Module, Callable[[], Scores]]:
        """The calibrated network of a scheme, and its scorer."""
        file = self._folder / f"{scheme.name}.yaml"
        write_scheme(file, scheme.to_dict())
        detector = self._detector("ptq", str(file))
        detector.calibrate(self._data)
        return detector.network, lambda: self._score(detector)

    def _detector(self, arm: Arm, scheme: str | None) -> CenterPointDetector:
        model = self._model
        detector = CenterPointDetector(
            network=model.network_config,
            weights=model.weights,
            arm=arm,
            scheme=scheme,
            post_processing=model.post_processing,
            test_time_flip=model.test_time_flip,
        )
        detector.configure_model()
        return detector.to(self._device).eval()

    def _score(self, detector: CenterPointDetector) -> Scores:
        pairs = zip(self._reference_heads, self._heads(detector), strict=True)
        distance = output_distance(pairs, self._model.code_weights)
        loss = distance.heatmap + self._model.loc_weight * distance.boxes
        scores = {"loss": loss, **distance._asdict()}
        return scores | (score_detector(detector, self._data) if self._score_detections else {})

    @cached_property
    def context(self) -> dict[str, Any]:
        """What scores depend on beside the scheme; plain values."""
        data, model = self._data, self._model
        context: dict[str, Any] = {
            "checkpoint_sha256": sha256_of(str(model.weights)),
            "network": asdict(model.network_config),
            "code_weights": list(model.code_weights),
            "loc_weight": model.loc_weight,
            "calibration": data.calibration_info(),
            "data": asdict(data.evaluation_config),
            "batch_size": data.batch_size,
            "samples": self._tokens(row for batch in self._batches for row in batch["sample_rows"]),
        }
        if self._score_detections:
            post_processing = asdict(model.post_processing)
            context |= {"scored": self._tokens(data.eval_rows), "post_processing": post_processing}
            context |= {"test_time_flip": model.test_time_flip}
        return context

    def _tokens(self, rows: Iterable[Any]) -> list[str]:
        return [self._data.index.sample_token(int(row)) for row in rows]
