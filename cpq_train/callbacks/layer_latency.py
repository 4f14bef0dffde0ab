"""Time by layer during fit and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from cpq_train.callbacks.layer_probe import LayerProbe, Record
from cpq_train.profiling.detector_parts import STEP_FUNCTIONS
from cpq_train.profiling.instrument import Part, observing
from cpq_train.profiling.latency import Stopwatch
from cpq_train.report.training_costs import LAYER_LATENCY_FILE, WHOLE
from cpq_train.training.detector import CenterPointDetector

BACKWARD = Part("backward", "backward")
REST = "unattributed"


class LayerLatency(LayerProbe):
    """Milliseconds of every layer in single steps of fit and validation.

    Layers are timed in the forward pass; rulebooks, targets, loss, the backward pass as one, decode and NMS
    have rows of their own, and so have the whole step and what no row names, the optimizer among it. Writes
    `layer_latency.csv` into the run directory and logs `latency_ms/step`, and `latency_ms/<layer>` for the
    slowest, in validation with `val/` before it. `LayerProbe` says which steps are measured.

    CUDA events on a GPU, read when the step is over; the clock on the CPU. A measured step takes a few per
    cent longer, on a GPU it also waits for the device at its end; the other steps cost nothing.

    Args:
        every_n_steps: Batches from one that is measured to the next; null measures nothing.
        first_step: The first one of an interval, counted from 0; those before it warm up.
        num_logged: Layers, the slowest, whose times go to the loggers too, `metrics.csv` left out.
    """

    file_name = LAYER_LATENCY_FILE
    shift = 0
    columns = ("layer", "kind", "ms")

    def __init__(self, every_n_steps: int | None = 500, first_step: int = 10, num_logged: int = 10) -> None:
        super().__init__(every_n_steps, first_step, num_logged)
        self._watch: Stopwatch | None = None
        self._records: list[Record] = []

    @contextmanager
    @override
    def measuring(self, trainer: Trainer, module: CenterPointDetector) -> Iterator[None]:
        watch = self._watch = Stopwatch(module.device)
        with observing(module.network, watch, STEP_FUNCTIONS):
            watch.start()
            yield
            self._watch = None
            times = watch.stop()
        by_time = sorted(times.own.items(), key=lambda item: -item[1])
        rest_ms = times.whole_ms - sum(times.own.values())
        self._records = [
            *({"layer": part.name, "kind": part.kind, "ms": ms} for part, ms in by_time),
            {"layer": REST, "kind": REST, "ms": rest_ms},
            {"layer": WHOLE, "kind": WHOLE, "ms": times.whole_ms},
        ]

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._watch is not None:
            self._watch.enter(BACKWARD)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._watch is not None:
            self._watch.leave(BACKWARD, None)

    @override
    def records(self) -> list[Record]:
        return self._records

    @override
    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        return {f"latency_ms/{record['layer']}": float(record["ms"]) for record in records}
