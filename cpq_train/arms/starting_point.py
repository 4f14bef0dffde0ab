"""Better starting points for a quantized network: what `calibrate` may do beyond finding ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import distributed, nn

from cpq_train.arms.subject import Subject
from cpq_train.common.console import print_plain
from cpq_train.common.errors import UserError
from cpq_train.models.foreground import foreground_error
from cpq_train.models.topology import blocks_of
from cpq_train.quantization.ptq.adaround import BlockRounding, round_adaptively
from cpq_train.quantization.ptq.bias_correction import correct_biases
from cpq_train.quantization.ptq.range_search import is_searched, search_ranges
from cpq_train.quantization.ptq.twins import Twins
from cpq_train.quantization.quantizer import Quantizer

NUM_SEARCH_BATCHES = 2
"""Batches on which every range of a foreground search is tried; each costs up to 8 passes per quantizer."""


class Batches(Protocol):
    """A data loader, as far as it is needed here."""

    def __len__(self) -> int:
        """How many batches there are."""

    def __iter__(self) -> Iterator[Any]:
        """The batches."""


@dataclass(frozen=True)
class CalibrationConfig:
    """What calibration does once the ranges are found.

    Attributes:
        bias_correction: Take the mean error of every layer's output channels into its bias.
        adaround_num_steps: Steps of learned rounding per block of the network; 0 rounds to the nearest.
        num_batches: Batches of calibration samples, spread evenly over all of them, that both work on. They
            are held in memory.
    """

    bias_correction: bool = False
    adaround_num_steps: int = 0
    num_batches: int = 8

    def __post_init__(self) -> None:
        for name, least in (("adaround_num_steps", 0), ("num_batches", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"model.calibration.{name} is {getattr(self, name)}: expected {least} or more"
                )

    @property
    def changes_weights(self) -> bool:
        """Whether weights or biases are no longer the float ones afterwards."""
        return self.bias_correction or self.adaround_num_steps > 0


def improve(
    subject: Subject,
    new_loader: Callable[[], Batches],
    forward: Callable[[nn.Module, Any], Any],
    config: CalibrationConfig,
    show_progress: bool,
) -> dict[str, Any]:
    """Search ranges at the foreground, learn the rounding, correct the biases: what was asked for.

    Every rank works on its own batches, so that none waits long for another; rank 0's result is then
    everybody's.

    Args:
        subject: A quantized network whose ranges were just found; its weights are still the float ones.
        new_loader: Makes the loader of the calibration samples; not called where nothing was asked for.
        forward: Runs a network on one batch.
        config: What to do.
        show_progress: Whether progress bars and tables are printed.

    Returns:
        What a checkpoint says of it.
    """
    network = subject.network
    has_searched = any(isinstance(m, Quantizer) and is_searched(m) for m in network.modules())
    if has_searched or config.changes_weights:
        with _evaluating(network):
            twins = Twins.of(network, spread(new_loader(), config.num_batches), forward, show_progress)
            blocks = list(blocks_of(subject.network))
            few = replace(twins, batches=twins.batches[:NUM_SEARCH_BATCHES])
            search_ranges(few, foreground_error, blocks)
            if config.adaround_num_steps:
                roundings = round_adaptively(twins, blocks, config.adaround_num_steps)
                if show_progress:
                    print_plain(rounding_table(roundings))
            if config.bias_correction:
                correct_biases(twins)
        _agree(network)
    return {
        "bias_correction": config.bias_correction,
        "adaround_num_steps": config.adaround_num_steps,
        "num_batches": config.num_batches,
    }


def spread(loader: Batches, num_batches: int) -> list[Any]:
    """So many batches, evenly spaced over the loader: neighbours often show one scene."""
    total = len(loader)
    chosen = {i * total // num_batches for i in range(num_batches)}
    return [batch for number, batch in enumerate(loader) if number in chosen]


def rounding_table(roundings: Sequence[BlockRounding]) -> Table:
    """Squared error of every block's output before and after its rounding was learned."""
    table = Table(title="Learned rounding: squared error of each block's output", title_justify="left")
    for header in ("block", "nearest", "learned", "kept"):
        table.add_column(header)
    for r in roundings:
        kept = "learned" if r.is_kept else "nearest"
        table.add_row(r.block, f"{r.nearest:.4g}", f"{r.learned:.4g}", kept)
    return table


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@torch.no_grad()
def _agree(network: nn.Module) -> None:
    """Give every rank rank 0's tensors: a GPU's sums may differ in their last bit."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for tensor in network.state_dict().values():
        whole = tensor.contiguous()
        distributed.broadcast(whole, src=0)
        tensor.copy_(whole)
