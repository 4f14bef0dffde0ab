"""Training steps and evaluation passes of several arms, timed in turn and weighed.

An arm is a network of `arms_to_compare` and how it runs: on which kernels, in which precision. A step is
forward and backward with fixed gradients at the outputs; loss, optimizer and data are the same for all and
left out. With one thread the clock is the process's CPU time, so that other work on the machine does not
count; with more it is wall time; on CUDA it is CUDA events.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from arms_to_compare import build_arms, run
from torch import Tensor

from cpq_train.data.dataset import Batch
from cpq_train.models import CenterPoint, HeadOutput, NetworkConfig
from cpq_train.profiling.allocation import counting
from cpq_train.profiling.latency import Stopwatch, clock_of
from cpq_train.profiling.memory import observing_memory
from cpq_train.quantization.forward_pass import begin_forward, end_forward
from cpq_train.quantization.prepared import frozen, is_prepared
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import GradientPrecision, compute_gradients_in
from cpq_train.sparse import reference_kernels

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORKS = {"full": "centerpoint_voxel01.yaml", "quickstart": "quickstart_float.yaml"}
MIB = 2**20

Context = Callable[[], AbstractContextManager[Any]]
Outputs = list[Tensor]
Measured = dict[str, list[float]]
"""Arm -> its number in each round."""


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        network: float, qat, pq or learned.
        kernels: What its step runs in.
        precision: What its forward pass runs in.
        gradients: What gradients of its quantized dense layers are computed in.
    """

    network: str
    kernels: Context = nullcontext
    precision: Context = nullcontext
    gradients: GradientPrecision = "fp32"


def _in_bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


FLOAT, FLOAT_SAME, QAT, PQ = "float", "float, same kernels", "QAT", "pytorch-quantization"
FLOAT_BF16, QAT_BF16 = "float bf16", "QAT bf16"
LEARNED = "QAT, learned ranges"
ARMS = {
    FLOAT: Arm("float", reference_kernels),
    FLOAT_SAME: Arm("float"),
    QAT: Arm("qat"),
    PQ: Arm("pq"),
    FLOAT_BF16: Arm("float", reference_kernels, _in_bf16),
    QAT_BF16: Arm("qat", precision=_in_bf16, gradients="bf16"),
    LEARNED: Arm("learned"),
}
"""`float` runs on spconv's own kernels, all others on those of this project where it has some. Learned ranges
have a network of their own, see `Workload.with_learned_ranges`."""

PARTS = {
    "dense": (FLOAT, QAT, PQ, FLOAT_BF16, QAT_BF16),
    "backbone": (FLOAT, QAT, PQ),
    "head": (FLOAT, QAT, PQ),
    "sparse": (FLOAT, FLOAT_SAME, QAT, PQ),
    "whole": (FLOAT, FLOAT_SAME, QAT, PQ, FLOAT_BF16, QAT_BF16),
    "evaluation": (FLOAT, FLOAT_SAME, QAT),
}
"""Part of a step (dense is BEV backbone and head; sparse has its rulebooks), or a whole forward pass of
evaluation -> the arms that it tells apart."""


@dataclass(frozen=True)
class Workload:
    """Networks of one size and what they run on.

    Attributes:
        networks: float, qat and pq; learned where it was asked for.
        batch: Voxels of all samples.
        device: cpu or cuda.
    """

    networks: Mapping[str, CenterPoint]
    batch: Batch
    device: str

    @property
    def num_voxels(self) -> int:
        """Of all samples."""
        return len(self.batch["voxel_coords"])

    @classmethod
    def of(cls, config: NetworkConfig, batch: Batch, device: str, scheme: Path | None = None) -> Workload:
        """Networks of a size, their ranges from a batch, with max calibration: the quickest to make."""
        chosen = Scheme.from_file(scheme or CONFIGS / "schemes" / "int8.yaml")
        inputs = replace(chosen.defaults.input, method="max")
        chosen = replace(chosen, defaults=replace(chosen.defaults, input=inputs))
        moved = _moved(batch, device)
        arms = build_arms(config, chosen, moved)
        return cls({name: network.to(device) for name, network in arms.items()}, moved, device)

    def on(self, batch: Batch) -> Workload:
        """The same networks on another batch."""
        return replace(self, batch=_moved(batch, self.device))

    def with_learned_ranges(self) -> Workload:
        """With another copy of qat, whose ranges are parameters."""
        learned = copy.deepcopy(self.networks["qat"])
        apply_policy(learned, "learned")
        return replace(self, networks={**self.networks, "learned": learned})


def _moved(batch: Batch, device: str) -> Batch:
    moved: Any = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)


def config_of(name: str) -> tuple[NetworkConfig, int]:
    """Sizes and number of sweeps of one of `NETWORKS`."""
    content = yaml.safe_load((CONFIGS / NETWORKS[name]).read_text())
    return NetworkConfig(**content["model"]["network"]), content["data"]["num_sweeps"]


def time_part(
    work: Workload,
    part: str,
    num_rounds: int,
    arms: tuple[str, ...] = (),
    done: Callable[[], object] = lambda: None,
) -> Measured:
    """Milliseconds of arms in each round, in turn: each round starts with the next, every other is reversed.

    Args:
        work: Networks and batch.
        part: A key of `PARTS`.
        num_rounds: That count; one more warms up.
        arms: Which; nothing is those of the part.
        done: Called behind each round.
    """
    device = torch.device(work.device)
    watch = Stopwatch(device, clock_of(device).now)
    times: Measured = {arm: [] for arm in arms or PARTS[part]}
    with _passes(work, part, list(times)) as passes:
        for number in range(num_rounds + 1):
            first = number % len(times)
            order = [*times][first:] + [*times][:first]
            for arm in order[:: 1 if number % 2 else -1]:
                compute_gradients_in(work.networks[ARMS[arm].network], ARMS[arm].gradients)
                watch.start()
                passes[arm]()
                times[arm].append(watch.stop().whole_ms)
                work.networks[ARMS[arm].network].zero_grad()
            done()
    return {arm: values[1:] for arm, values in times.items()}


def ratios(measured: Measured, arm: str, against: str) -> list[float]:
    """Of two arms, within each round."""
    return [a / b for a, b in zip(measured[arm], measured[against], strict=True)]


def weigh(work: Workload, arms: tuple[str, ...] = PARTS["whole"]) -> tuple[Measured, Measured]:
    """MiB of a whole step by arm: its peak, and what its forward pass keeps for backward."""
    device = torch.device(work.device)
    peak, kept = {}, {}
    with _passes(work, "whole", list(arms)) as passes:
        for name in arms:
            arm = ARMS[name]
            network = work.networks[arm.network]
            compute_gradients_in(network, arm.gradients)
            passes[name]()
            with counting(device) as allocator:
                before = allocator.allocated()
                allocator.take_peak()
                passes[name]()
                peak[name] = [(allocator.take_peak() - before) / MIB]
            network.zero_grad()
            with arm.kernels(), arm.precision(), observing_memory(network, device) as observer:
                outputs = run(network, work.batch)
                observer.finish()
                kept[name] = [sum(row.saved_bytes for row in observer.rows()) / MIB]
            del outputs
    return peak, kept


@contextmanager
def _passes(work: Workload, part: str, arms: list[str]) -> Iterator[dict[str, Callable[[], None]]]:
    """Arm -> what is timed; all take the same input and the same gradients at their outputs."""
    with torch.no_grad():
        network, batch = work.networks["float"], work.batch
        volume = network.backbone_3d(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])
        bev = network.map_to_bev_module(volume)
        inputs = {"head": network.backbone_2d(bev)}.get(part, bev)
    forwards = {arm: partial(_forward, work, part, ARMS[arm], inputs) for arm in arms}
    if part != "evaluation":
        yield {arm: partial(_step, ARMS[arm], run, _gradients(run)) for arm, run in forwards.items()}
        return
    with ExitStack() as stack:
        for network in work.networks.values():
            network.eval()
            stack.callback(network.train)
            stack.enter_context(frozen(network))
        yield {arm: partial(_evaluate, ARMS[arm], run) for arm, run in forwards.items()}


def _forward(work: Workload, part: str, arm: Arm, inputs: Tensor) -> Outputs:
    network, batch = work.networks[arm.network], work.batch
    if part in ("whole", "evaluation"):
        return _maps(run(network, batch))
    with computing(network):
        return _forward_of_part(network, batch, part, inputs)


@contextmanager
def computing(network: CenterPoint) -> Iterator[None]:
    """Lets the parts of a network compute as they do in its whole forward pass."""
    if not is_prepared(network):
        yield
        return
    begin_forward(network, None)
    try:
        yield
    finally:
        end_forward(network, None, None)


def _forward_of_part(network: CenterPoint, batch: Batch, part: str, inputs: Tensor) -> Outputs:
    if part == "sparse":
        volume = network.backbone_3d(batch["voxel_features"], batch["voxel_coords"], batch["batch_size"])
        return [volume.features]
    # A fresh leaf, because maps need a gradient in training too.
    x = inputs.detach().requires_grad_()
    x = x if part == "head" else network.backbone_2d(x)
    return [x] if part == "backbone" else _maps(network.dense_head(x))


def _maps(heads: list[HeadOutput]) -> Outputs:
    return [out for head in heads for out in head.values()]


def _step(arm: Arm, forward: Callable[[], Outputs], gradients: Outputs) -> None:
    with arm.kernels():
        with arm.precision():
            outputs = forward()
        cast = [g.to(out.dtype) for g, out in zip(gradients, outputs, strict=True)]
        torch.autograd.backward(outputs, cast)


@torch.inference_mode()
def _evaluate(arm: Arm, forward: Callable[[], Outputs]) -> None:
    with arm.kernels(), arm.precision():
        forward()


@torch.no_grad()
def _gradients(forward: Callable[[], Outputs]) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    return [torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator)) for out in forward()]
