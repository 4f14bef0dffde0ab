"""Memory by layer during fit and validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from cpq_train.callbacks.layer_probe import LayerProbe, Record
from cpq_train.profiling.detector_parts import NETWORK_FUNCTIONS
from cpq_train.profiling.memory import MemoryObserver, observing_memory
from cpq_train.profiling.report import BYTES_PER_MIB
from cpq_train.report.training_costs import LAYER_MEMORY_FILE, WHOLE, memory_bytes
from cpq_train.training.detector import CenterPointDetector


class LayerMemory(LayerProbe):
    """Bytes of every layer in single steps of fit and validation: kept for backward, output, peak.

    A training step is observed until its backward pass begins. Writes `layer_memory.csv` into the run
    directory, with a row for the whole step, and logs `memory_mib/step` (its peak), and `memory_mib/<layer>`
    (kept for backward and peak together) for the largest, in validation with `val/` before it. `LayerProbe`
    says which steps are measured.

    The allocator's statistics on a GPU (whose peak since the start is reset by that); counted tensors on the
    CPU, which makes a measured step about a tenth longer. The other steps cost nothing.

    Args:
        every_n_steps: Batches from one that is measured to the next; null measures nothing.
        first_step: The first one of an interval, counted from 0; it is not that of LayerLatency, which would
            measure this callback too.
        num_logged: Layers, the largest, whose numbers go to the loggers too, `metrics.csv` left out.
    """

    file_name = LAYER_MEMORY_FILE
    shift = 1
    columns = (
        *("layer", "kind", "parameter_bytes", "buffer_bytes"),
        *("saved_bytes", "output_bytes", "peak_bytes"),
    )

    def __init__(self, every_n_steps: int | None = 500, first_step: int = 11, num_logged: int = 10) -> None:
        super().__init__(every_n_steps, first_step, num_logged)
        self._observer: MemoryObserver | None = None
        self._forward = ExitStack()

    @contextmanager
    @override
    def measuring(self, trainer: Trainer, module: CenterPointDetector) -> Iterator[None]:
        with self._forward:
            self._observer = self._forward.enter_context(
                observing_memory(module.network, module.device, NETWORK_FUNCTIONS)
            )
            yield
            self._finish()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._finish()

    def _finish(self) -> None:
        """The forward pass is over."""
        if self._observer is not None:
            self._observer.finish()
        self._forward.close()

    @override
    def records(self) -> list[Record]:
        assert self._observer is not None
        rows = sorted(self._observer.rows(), key=lambda row: -(row.saved_bytes + row.peak_bytes))
        records = [asdict(row) for row in rows]
        sums = {column: sum(record[column] for record in records) for column in self.columns[2:]}
        whole = {"name": WHOLE, "kind": WHOLE, **sums, "peak_bytes": self._observer.peak_bytes()}
        self._observer = None
        return [{"layer": record.pop("name"), **record} for record in (*records, whole)]

    @override
    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        sizes = {
            record["layer"]: memory_bytes(record["layer"], record["saved_bytes"], record["peak_bytes"])
            for record in records
        }
        return {f"memory_mib/{layer}": size / BYTES_PER_MIB for layer, size in sizes.items()}
