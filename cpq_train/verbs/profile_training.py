"""`profile --training_step true`: where the time of a training step goes, in fits of three steps.

A fit is Lightning's, with the detector's own step, loss, clipping and optimizer. Its first step warms up, of
the second only the whole is timed, in the third every part. Several networks take turns, a fit each round,
and train on the same batches. A step goes from the end of the one before to its own: the loader is in it.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from itertools import chain, repeat
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.data.datamodule import NuScenesDataModule
from cpq_train.profiling.allocation import tensors_in
from cpq_train.profiling.detector_parts import QUANTIZER_FUNCTIONS, STEP_FUNCTIONS
from cpq_train.profiling.instrument import Part, observing
from cpq_train.profiling.latency import PassTimes, Stopwatch, clock_of
from cpq_train.profiling.step_report import StepTimes, step_document, step_table, write_steps
from cpq_train.training.detector import CenterPointDetector
from cpq_train.verbs.profile_input import OneCloud, ProfileSettings

NUM_STEPS = 3
FORWARD = "forward"
LOADER, OPTIMIZER = Part("loader", "loader"), Part("optimizer", "optimizer")
LOSS_BACKWARD = Part("loss:backward", "backward")

Batches = Iterable[Any]


def check_trainable(name: str, model: CenterPointDetector) -> None:
    """Refuse a network that `fit` does not train.

    Raises:
        UserError: It is of the arm ptq.
    """
    if model.subject.arm == "ptq":
        raise UserError(
            f"--training_step true and {name}, of the arm ptq, which is not trained; "
            "accepted: float, float_tuned, qat"
        )


def profile_training(
    models: Mapping[str, CenterPointDetector],
    data: NuScenesDataModule,
    cloud: OneCloud,
    settings: ProfileSettings,
    new_trainer: Callable[..., Trainer],
) -> dict[str, Any]:
    """Measure training steps, print them and write what was asked for.

    With `settings.sample` they take batches as a fit does; else the cloud, without boxes, is the batch.

    Args:
        models: Name -> network; none of the arm ptq.
        data: Gives the batches.
        cloud: What else was measured on.
        settings: How often, and where to.
        new_trainer: Makes a Trainer with its device, precision and clipping.

    Returns:
        The contents of `training_step.json`.
    """
    clock, now = clock_of(cloud.device)
    is_sample = settings.sample is not None
    new_batches = data.train_dataloader if is_sample else lambda: [cloud.training_batch()]
    steps = time_steps(models, new_batches, new_trainer, Stopwatch(cloud.device, now), settings.num_passes)
    context = {
        **cloud.context(settings),
        "clock": clock,
        "batches": "of training" if is_sample else "this input, without boxes",
        "batch_size": data.batch_size if is_sample else 1,
    }
    document = step_document(context, steps)
    print_plain(f"Training step, {clock}, medians of {settings.num_passes}:", step_table(document))
    if settings.output is not None:
        write_steps(settings.output, document)
    return document


def time_steps(
    models: Mapping[str, CenterPointDetector],
    new_batches: Callable[[], Batches],
    new_trainer: Callable[..., Trainer],
    watch: Stopwatch,
    num_rounds: int,
) -> dict[str, StepTimes]:
    """Time training steps of several networks in turn; their weights move.

    Args:
        models: Name -> network, on the device.
        new_batches: Called once for each of them; all have to give the same batches.
        new_trainer: Makes a Trainer with its device, precision and clipping.
        watch: What the parts are timed with.
        num_rounds: Fits of each.
    """
    clocks = {name: _StepClock(watch, new_batches) for name in models}
    names = list(models)
    for _ in range(num_rounds):
        for name in names:
            with _quiet():
                trainer = new_trainer(max_steps=NUM_STEPS, callbacks=[clocks[name]])
                trainer.fit(models[name].train(), clocks[name].batches)
        names.reverse()
    return {name: StepTimes(clock.by_part, clock.plain_ms) for name, clock in clocks.items()}


class _StepObserver:
    """Tells a stopwatch of the parts of a step, and in the backward pass whose it is just now."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._backward: Part | None = None

    def enter(self, part: Part) -> None:
        self._watch.enter(part)

    def leave(self, part: Part, output: Any) -> None:
        self._watch.leave(part, output)
        if part.kind == FORWARD:
            for tensor in tensors_in(output):
                if tensor.grad_fn is not None:  # a hook of the tensor would change who computes what
                    behind = Part(f"{part.name}:backward", "backward")
                    tensor.grad_fn.register_prehook(partial(self._reach, behind))

    def enter_backward(self) -> None:
        self._backward = LOSS_BACKWARD
        self._watch.enter(LOSS_BACKWARD)

    def leave_backward(self) -> None:
        assert self._backward is not None
        self._watch.leave(self._backward, None)
        self._backward = None

    def _reach(self, part: Part, gradients: tuple[Tensor, ...]) -> None:
        """The gradient of what a part put out is known: its own backward pass begins."""
        if self._backward not in (None, part):
            self.leave_backward()
            self._backward = part
            self._watch.enter(part)


class _StepClock(Callback):
    """Gives the batches of one network's fits, and times the second and the third step of each.

    Args:
        watch: Takes the times.
        new_batches: Makes the loader; it is asked once, for all fits.

    Attributes:
        batches: An endless epoch.
        by_part: Third steps.
        plain_ms: Second steps.
    """

    def __init__(self, watch: Stopwatch, new_batches: Callable[[], Batches]) -> None:
        self.batches = self._fetch(new_batches)
        self.by_part: list[PassTimes] = []
        self.plain_ms: list[float] = []
        self._watch = watch
        self._observer: _StepObserver | None = None
        self._open = ExitStack()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == NUM_STEPS - 2:
            self.plain_ms.append(self._watch.stop().whole_ms)
            self._observe(trainer, pl_module)
        elif batch_idx == NUM_STEPS - 1:
            self.by_part.append(self._watch.stop())
            self._open.close()
        self._watch.start()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._observer is not None:
            self._observer.enter_backward()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is not None:
            self._observer.leave_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._observer is not None:  # gradients are clipped next
            self._observer.enter(OPTIMIZER)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def _observe(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, CenterPointDetector)
        observer = self._observer = _StepObserver(self._watch)
        self._open.callback(setattr, self, "_observer", None)
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: observer.leave(OPTIMIZER, None))  # its last step
        children = {name: Part(name, FORWARD) for name, _ in module.network.named_children()}
        functions = (*STEP_FUNCTIONS, *QUANTIZER_FUNCTIONS)
        self._open.enter_context(observing(module.network, observer, functions, children))

    def _fetch(self, new_batches: Callable[[], Batches]) -> Iterator[Any]:
        batches = chain.from_iterable(repeat(new_batches()))
        while True:
            if self._observer is not None:
                self._observer.enter(LOADER)
            batch = next(batches)
            if self._observer is not None:
                self._observer.leave(LOADER, None)
            yield batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what every start of a fit says: devices, layers, that nothing is validated."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
