"""Numbers of a device that the host may have later: to wait for them would keep the device waiting too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any]
Take: TypeAlias = Callable[[Array], None]


class _Letter(NamedTuple):
    values: Tensor
    has_arrived: torch.cuda.Event | None
    take: Take


class Mailbox:
    """Carries tensors to the host while the device goes on; they are handed over when next asked for."""

    def __init__(self) -> None:
        self._letters: list[_Letter] = []

    def __len__(self) -> int:
        return len(self._letters)

    def send(self, values: Tensor, take: Take) -> None:
        """Have `take` called with the values on the host, at the next `receive`."""
        values = values.detach()
        if values.device.type != "cuda":
            self._letters.append(_Letter(values.clone(), None, take))
            return
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        has_arrived = torch.cuda.Event()
        has_arrived.record(torch.cuda.current_stream(values.device))
        self._letters.append(_Letter(on_host, has_arrived, take))

    def take_arrived(self) -> None:
        """Hand over what the device has come to, without waiting."""
        letters, self._letters = self._letters, []
        for letter in letters:
            if letter.has_arrived is None or letter.has_arrived.query():
                letter.take(letter.values.numpy())
            else:
                self._letters.append(letter)

    def receive(self) -> None:
        """Hand over what was sent; waits only for what the device has not come to yet."""
        letters, self._letters = self._letters, []
        for letter in letters:
            if letter.has_arrived is not None:
                letter.has_arrived.synchronize()
            letter.take(letter.values.numpy())
