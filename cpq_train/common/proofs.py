"""Quick ways of computing whole numbers on a device, which have to be exact: looked at when first used.

The answer is not waited for (`late.py`): a way that is found not to be exact was used in a step or two by
then, which is told, and is not used again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from cpq_train.common.late import Mailbox


class Proofs:
    """What is known of some ways.

    Args:
        what: They compute, for the warning.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[Hashable] = set()
        self._inexact: set[Hashable] = set()
        self._answers = Mailbox()

    def trusts(self, way: Hashable) -> bool:
        """Whether a way may be used: nothing is known against it."""
        if len(self._answers) and not _is_captured():
            self._answers.take_arrived()
        return way not in self._inexact

    def look(self, way: Hashable, found: Tensor, compute: Callable[[], Tensor]) -> None:
        """Compare what a way found with what is sure, the first time that it is used.

        Args:
            way: What its exactness depends on.
            found: By it.
            compute: The same, in a way that is sure.
        """
        if way in self._seen or _is_captured():
            return
        self._seen.add(way)
        is_other = (compute() != found).any()
        self._answers.send(is_other, lambda is_other: self._note(way, bool(is_other)))

    def _note(self, way: Hashable, is_other: bool) -> None:
        if is_other:
            self._inexact.add(way)
            warnings.warn(
                f"{self._what} are not exact for {way}: some were rounded in a step before this one; from "
                "now on they are computed in a slower way",
                stacklevel=2,
            )


def _is_captured() -> bool:
    """Whether a CUDA graph is being made, which must not hold what is done once."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
