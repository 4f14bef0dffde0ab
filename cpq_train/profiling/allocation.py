"""How many bytes are allocated now, and at most since the last look: the allocator's word, or a count.

CUDA's caching allocator keeps statistics. On the CPU nothing does, so that there every tensor that an
operation makes is counted until its storage is freed; what an operation keeps to itself is not seen (its
scratch memory, weights packed for oneDNN).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpq_train.sparse import SparseConvTensor


class Allocator(Protocol):
    """A source of numbers of bytes."""

    def allocated(self) -> int:
        """Bytes in use now."""

    def take_peak(self) -> int:
        """Most bytes in use since this was last asked."""


class CudaAllocator:
    """The statistics of CUDA's allocator; asking it does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        """See `Allocator`."""
        return torch.cuda.memory_allocated(self.device)

    def take_peak(self) -> int:
        """See `Allocator`."""
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class CountedTensors(TorchDispatchMode):
    """Counts the storages of tensors that operations make, while it is entered; from 0 on."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[int, weakref.finalize[..., Any]]] = {}
        self._now = self._peak = 0

    def allocated(self) -> int:
        """See `Allocator`."""
        return self._now

    def take_peak(self) -> int:
        """See `Allocator`."""
        peak, self._peak = self._peak, self._now
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        kwargs = kwargs or {}
        # What comes in uncounted was made outside, and what comes out may be a view of it.
        for tensor in _plain_tensors((*args, *kwargs.values())):
            self._meet(tensor, 0)
        output = func(*args, **kwargs)
        for tensor in _plain_tensors((output,)):
            self._meet(tensor, tensor.untyped_storage().nbytes())
        return output

    def _meet(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = (num_bytes, weakref.finalize(storage, self._free, key))
            self._now += num_bytes
            self._peak = max(self._peak, self._now)

    def _free(self, key: int) -> None:
        self._now -= self._known.pop(key)[0]

    def __exit__(self, *exception: Any) -> None:
        """Stop counting; storages that live on no longer report to this object."""
        super().__exit__(*exception)
        for _, finalizer in self._known.values():
            finalizer.detach()
        self._known.clear()


@contextmanager
def counting(device: torch.device) -> Iterator[Allocator]:
    """The allocator of a device, for as long as it has to count."""
    if device.type == "cuda":
        yield CudaAllocator(device)
    else:
        with CountedTensors() as counted:
            yield counted


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested containers; of a sparse tensor its features."""
    leaves = tree_leaves(value)
    found = (leaf.features if isinstance(leaf, SparseConvTensor) else leaf for leaf in leaves)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _plain_tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Every tensor with a storage that an operation takes or makes; oneDNN's packed weights have none."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _plain_tensors(value)
