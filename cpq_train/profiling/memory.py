"""Memory by layer: parameters, buffers, what is kept for backward, outputs, the peak while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cpq_train.profiling.allocation import Allocator, counting, tensors_in
from cpq_train.profiling.instrument import Function, Part, observing

OUTSIDE = Part("outside of the network", "loss and others", is_layer=False)


@dataclass
class MemoryRow:
    """Bytes of a part of the network.

    Attributes:
        name: Of the part.
        kind: Of the part.
        parameter_bytes: Its parameters; one shared by several layers counts for the first.
        buffer_bytes: Its buffers, in the same way.
        saved_bytes: What autograd keeps of its forward pass for backward: activations, and rulebooks of
            sparse layers. A storage counts for the part that saved it first; parameters and buffers do not.
        output_bytes: Its outputs, over all calls.
        peak_bytes: Most that was allocated while it ran, above what was allocated when it began.
    """

    name: str
    kind: str
    parameter_bytes: int = 0
    buffer_bytes: int = 0
    saved_bytes: int = 0
    output_bytes: int = 0
    peak_bytes: int = 0


@dataclass
class _Open:
    part: Part
    base: int
    peak: int


class MemoryObserver:
    """An observer that takes the memory of every part; made by `observing_memory`.

    Args:
        network: What is observed.
        allocator: Tells bytes.
    """

    def __init__(self, network: nn.Module, allocator: Allocator) -> None:
        self._allocator = allocator
        self._rows: dict[Part, MemoryRow] = {}
        self._persistent = {_address(t) for t in (*network.parameters(), *network.buffers())}
        self._kept: dict[int, torch.UntypedStorage] = {}
        allocator.take_peak()
        self._open = [_Open(OUTSIDE, allocator.allocated(), allocator.allocated())]
        self._network = network
        self._is_finished = False

    def enter(self, part: Part) -> None:
        """See `Observer`."""
        self._fold_peak()
        now = self._allocator.allocated()
        self._open.append(_Open(part, now, now))

    def leave(self, part: Part, output: Any) -> None:
        """See `Observer`."""
        self._fold_peak()
        finished = self._open.pop()
        row = self._row(part)
        row.peak_bytes = max(row.peak_bytes, finished.peak - finished.base)
        row.output_bytes += sum(tensor.nbytes for tensor in tensors_in(output))

    def keep(self, tensor: Tensor) -> Tensor:
        """Told by autograd of a tensor that it saves."""
        if tensor.layout != torch.strided:  # no storage to count
            return tensor
        address = _address(tensor)
        if tensor.nbytes and address not in self._persistent and address not in self._kept:
            # Held so that no other tensor comes to lie at the same address.
            self._kept[address] = tensor.untyped_storage()
            self._row(self._open[-1].part).saved_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def finish(self) -> None:
        """The pass is over, and what it keeps may go; what comes later is not counted."""
        if not self._is_finished:
            self._fold_peak()
            self._kept.clear()
            self._is_finished = True

    def peak_bytes(self) -> int:
        """Most that was allocated up to `finish`, above what was allocated when the observer was made."""
        return self._open[0].peak - self._open[0].base

    def rows(self) -> list[MemoryRow]:
        """Layers and functions, and containers that something was saved in, in the order of the pass."""
        seen: set[int] = set()
        for part, row in self._rows.items():
            if part.is_layer and ":" not in part.name:
                self._add_state(part.name, row, seen)
        return [row for part, row in self._rows.items() if part.is_layer or row.saved_bytes]

    def _add_state(self, name: str, row: MemoryRow, seen: set[int]) -> None:
        try:
            module = self._network.get_submodule(name)
        except AttributeError:  # a function that works for no module
            return
        row.parameter_bytes = _new_bytes(module.parameters(), seen)
        row.buffer_bytes = _new_bytes(module.buffers(), seen)

    def _row(self, part: Part) -> MemoryRow:
        return self._rows.setdefault(part, MemoryRow(part.name, part.kind))

    def _fold_peak(self) -> None:
        peak = self._allocator.take_peak()
        for entry in self._open:
            entry.peak = max(entry.peak, peak)


@contextmanager
def observing_memory(
    network: nn.Module, device: torch.device, functions: Iterable[Function] = ()
) -> Iterator[MemoryObserver]:
    """Take the memory of every part of the passes inside."""
    with counting(device) as allocator:
        observer = MemoryObserver(network, allocator)
        saved = saved_tensors_hooks(observer.keep, lambda tensor: tensor)
        with saved, observing(network, observer, functions):
            yield observer


@contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Put the buffers back afterwards, which a training pass moves."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before[name])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _new_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    new = {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in seen}
    seen.update(new)
    return sum(new.values())
