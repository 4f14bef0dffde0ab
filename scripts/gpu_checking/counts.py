"""Operators that work issues, and the places where the host waits for the device."""

from __future__ import annotations

import io
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from results import Row
from steps import CONFIGS, FLOAT, FLOAT_BF16, LEARNED, PQ, QAT_BF16
from typing_extensions import override

from cpq_train.common.checkpoint import read_checkpoint
from cpq_train.common.kernels import as_on_gpu
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.models.decode import PostProcessing, decode
from cpq_train.profiling.latency import Stopwatch
from cpq_train.profiling.operator_count import calling_place, counting_operators
from cpq_train.quantization.ranges.policy import RangePolicy
from cpq_train.quantization.switches import evaluating
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.checkpoint_settings import data_settings_of
from cpq_train.verbs.trainer import QuantTrainer
from gpu_checking.costs import arms_of
from gpu_checking.guard import Found, each
from gpu_checking.numbers import inputs_of
from gpu_checking.setting import FLOAT_CHECKPOINT, Setting

SYNCHRONISES = "called a synchronizing CUDA operation"
"""What torch's debug mode says of an operation that waits."""

MOST_PLACES = 12
COUNTED_STEP = 2
"""The third: what the first and the second make and keep is there."""


def count_steps(setting: Setting) -> Found:
    """Operators and waits of a training step of the quickstart network, by arm."""
    arms = [arm for arm in arms_of(setting) if arm not in (PQ, FLOAT_BF16)]
    counted, wrong = each(arms, partial(_count_fit, setting))
    rows: list[Row] = [
        {
            "arm": arm,
            "operators": count.num_operators,
            "/ float": count.num_operators / counted[FLOAT].num_operators,
            **count.waits_row(),
        }
        for arm, count in counted.items()
    ]
    return Found(rows, wrong)


def count_decoding(setting: Setting) -> Found:
    """Operators and waits of decoding and NMS of a batch of the full network."""
    batch_size = setting.batch_sizes[-1]
    work = setting.work_on(batch_size)
    network = work.networks["qat"]
    post = PostProcessing().reaching(setting.config.point_cloud_range)
    with torch.no_grad(), evaluating(network), _path_of_a_gpu(setting):
        heads = network(*inputs_of(work.batch))
        decode(heads, setting.config, post)
        watch = Stopwatch(torch.device(setting.device))
        watch.start()
        found = decode(heads, setting.config, post)
        ms = watch.stop().whole_ms
        with _counting(setting.device) as count:
            decode(heads, setting.config, post)
    row: Row = {
        "batch": batch_size,
        "boxes": sum(len(detections.scores) for detections in found),
        "ms": ms,
        "operators": count.num_operators,
        **count.waits_row(),
    }
    return Found([row])


@dataclass
class _Count:
    """Operators, and the places where the host waits.

    Attributes:
        num_operators: That PyTorch dispatched.
        waits: Place -> how often.
        num_of_rulebooks: Waits inside spconv; None where they cannot be told.
    """

    num_operators: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    num_of_rulebooks: int | None = None

    def waits_row(self) -> dict[str, Any]:
        """Cells of a row."""
        places = [f"{place} ({times})" for place, times in self.waits.most_common(MOST_PLACES)]
        more = len(self.waits) - len(places)
        return {
            "waits": self.waits.total(),
            "waits of rulebooks": self.num_of_rulebooks,
            "where": ", ".join([*places, *([f"and {more} more"] if more else [])]),
        }


@contextmanager
def _counting(device: str) -> Iterator[_Count]:
    """Count while open; complete when it is left.

    On CUDA waits are those that torch's debug mode tells, elsewhere those that an operator is known for.
    """
    found = _Count()
    told = _Told()
    with counting_operators() as count, _telling(told) if device == "cuda" else nullcontext():
        yield found
    found.num_operators = count.num_operators
    if device == "cuda":
        found.waits, found.num_of_rulebooks = told.waits, told.num_of_rulebooks
    else:
        for (operator, place), times in count.waits.items():
            found.waits[f"{place} {operator.removeprefix('aten::')}"] += times


@dataclass
class _Told:
    waits: Counter[str] = field(default_factory=Counter)
    num_of_rulebooks: int = 0


@contextmanager
def _telling(told: _Told) -> Iterator[None]:
    """While open, note what torch warns of. What waits in a backward pass is told when that has ended."""

    def note(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if SYNCHRONISES not in str(message):
            show(message, category, *where, **more)
            return
        frames = [f for f in traceback.extract_stack() if f.filename not in (__file__, warnings.__file__)]
        if any("spconv" in Path(frame.filename).parts for frame in frames):
            told.num_of_rulebooks += 1
        else:
            told.waits[calling_place(frames)] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show, warnings.showwarning = warnings.showwarning, note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _path_of_a_gpu(setting: Setting) -> AbstractContextManager[None]:
    return as_on_gpu() if setting.device == "cpu" else nullcontext()


class _CountedStep(Callback):
    """Counts the third step of a fit, from its batch on the device to its optimizer's step."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._open = ExitStack()
        self.count: _Count | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["foreach"] = not group.get("fused")  # which torch chooses by itself on CUDA alone

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == COUNTED_STEP:
            self.count = self._open.enter_context(_counting(self._device))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._open.close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()


def _count_fit(setting: Setting, arm: str) -> _Count:
    """A fit of three steps, as `fit` makes them."""
    detector, data = _detector_and_data(setting, arm)
    counted = _CountedStep(setting.device)
    trainer = QuantTrainer(
        accelerator="cpu" if setting.device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if arm == QAT_BF16 else "32-true",
        max_steps=COUNTED_STEP + 1,
        limit_val_batches=0,
        gradient_clip_val=10,
        callbacks=[counted],
        default_root_dir=setting.folder,
        **dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        ),
    )
    with _path_of_a_gpu(setting), redirect_stdout(io.StringIO()):
        trainer.fit(detector, datamodule=data)
    if counted.count is None:
        raise RuntimeError(f"arm {arm}: the fit ended after {trainer.global_step} steps, before the third")
    return counted.count


def _detector_and_data(setting: Setting, arm: str) -> tuple[CenterPointDetector, NuScenesDataModule]:
    """The quickstart network in an arm, and simulated samples as its checkpoint takes them."""
    sizes = CenterPointDetector.load_from_checkpoint(setting.ptq).network_config
    detector = CenterPointDetector(
        sizes,
        weights=str(FLOAT_CHECKPOINT if arm == FLOAT else setting.ptq),
        arm="float_tuned" if arm == FLOAT else "qat",
        scheme=str(CONFIGS / "schemes" / "int8.yaml"),
        ranges=RangePolicy("learned" if arm == LEARNED else "frozen"),
        gradients="bf16" if arm == QAT_BF16 else "fp32",
    )
    settings = data_settings_of(read_checkpoint(setting.ptq), setting.ptq, sizes)
    data = NuScenesDataModule(str(setting.data), **settings.to_dict(), batch_size=1, num_workers=0)
    return detector, data
