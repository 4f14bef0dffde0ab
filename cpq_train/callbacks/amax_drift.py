"""How far the ranges of a run moved, and what they cut off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from typing_extensions import override

from cpq_train.common.errors import UserError
from cpq_train.loggers.csv_rows import append_rows, rows_before, write_rows
from cpq_train.quantization.ranges.calibration import static_ranges
from cpq_train.quantization.ranges.watch import RangeReading, RangeWatch
from cpq_train.report.amax_history import AMAX_DRIFT_FILE, AMAX_DRIFT_PICTURE, read_amax_history
from cpq_train.report.amax_picture import draw_amax_drift
from cpq_train.training.detector import CenterPointDetector

COLUMNS = ("step", *RangeReading._fields)
MOVED = math.log2(1.01)
"""A range that is 1 % wider or narrower than at the start has moved."""


class AmaxDrift(Callback):
    """Records the ranges of a qat fit beside their start and beside the tensors that they are for.

    Every `every_n_steps` steps, and in the last one, a row per quantizer is added to `amax_drift.csv` in the
    run directory (see `RangeReading`), drawn as `amax_drift.png` at the end. Loggers are told what `summary`
    makes of them, W&B also `amax/<quantizer>`.

    Ranks see tensors of their own; largest magnitudes and counts are put together. Ranges at the start are
    part of the checkpoint, so that a resumed run still measures from there. Other arms and other steps cost
    nothing.

    Args:
        every_n_steps: Optimizer steps from one that is measured to the next, from step 0 on; null measures
            nothing.
    """

    def __init__(self, every_n_steps: int | None = 200) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"amax_drift.every_n_steps is {every_n_steps}: expected 1 or more, or null")
        self.every_n_steps = every_n_steps
        self.start_amax: dict[str, Tensor] = {}
        self._is_on = False
        self._last_step: float = math.inf
        self._measured_step: int | None = None
        self._watch: RangeWatch | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        start = {name: amax.cpu() for name, amax in self.start_amax.items()}
        return {"start_amax": start} if start else {}  # Lightning leaves out what is empty

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start_amax = dict(state_dict["start_amax"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.start_amax = {}  # before a checkpoint brings its own

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CenterPointDetector)
        self._is_on = self.every_n_steps is not None and pl_module.subject.arm == "qat"
        if not self._is_on:
            return
        now = {name: amax.detach().clone() for name, amax in static_ranges(pl_module.network).items()}
        self.start_amax = now | {name: amax.to(pl_module.device) for name, amax in self.start_amax.items()}
        self._last_step = trainer.estimated_stepping_batches - 1
        self._measured_step = None
        if trainer.is_global_zero:
            file = _file(trainer)
            write_rows(file, COLUMNS, rows_before(file, trainer.global_step))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._is_on and self._is_due(trainer.global_step):
            assert isinstance(pl_module, CenterPointDetector)
            self._measured_step = trainer.global_step
            self._watch = RangeWatch(pl_module.network, self.start_amax)

    def _is_due(self, step: int) -> bool:
        """Whether the step is measured and this is the first of its batches."""
        assert self.every_n_steps is not None
        return step != self._measured_step and (step % self.every_n_steps == 0 or step == self._last_step)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._watch is not None:
            self._watch.finish()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watch is None:
            return
        readings = self._watch.readings()
        self._stop()
        if trainer.is_global_zero:
            step = self._measured_step
            append_rows(_file(trainer), COLUMNS, ({"step": step, **_fields(r)} for r in readings))
            for logger in trainer.loggers:
                each = _each_amax(readings) if isinstance(logger, WandbLogger) else {}
                logger.log_metrics({**summary(readings), **each}, step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_on and trainer.is_global_zero and _file(trainer).is_file():
            draw_amax_drift(_file(trainer).with_name(AMAX_DRIFT_PICTURE), read_amax_history(_file(trainer)))


def summary(readings: Sequence[RangeReading]) -> dict[str, float]:
    """All quantizers together; what none of them has is left out.

    Returns:
        `amax_drift/largest_abs_log2`, `amax_drift/num_moved` (quantizers that moved by more than 1 %),
        `amax_drift/median_clipped_share` and `amax_drift/min_weight_sqnr_db`.
    """
    drifts = list(_finite(abs(r.drift) for r in readings))
    shares = list(_finite(r.clipped_share for r in readings))
    sqnrs = list(_finite(r.sqnr_db for r in readings))
    found: dict[str, float] = {}
    if drifts:
        found["amax_drift/largest_abs_log2"] = max(drifts)
        found["amax_drift/num_moved"] = sum(drift > MOVED for drift in drifts)
    if shares:
        found["amax_drift/median_clipped_share"] = median(shares)
    if sqnrs:
        found["amax_drift/min_weight_sqnr_db"] = min(sqnrs)
    return found


def _each_amax(readings: Sequence[RangeReading]) -> dict[str, float]:
    return {f"amax/{r.quantizer}": r.amax for r in readings if math.isfinite(r.amax)}


def _fields(reading: RangeReading) -> dict[str, Any]:
    """A row of the file, to six digits; empty where there is no number."""
    values = {
        name: "" if math.isnan(value) else f"{value:.6g}"
        for name, value in reading._asdict().items()
        if name != "quantizer"
    }
    return {"quantizer": reading.quantizer, **values}


def _finite(values: Iterator[float]) -> Iterator[float]:
    return filter(math.isfinite, values)


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / AMAX_DRIFT_FILE
