"""A list whose items lie in files, for what is too much for memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cpq_train.common.folders import naming_full_disks
from cpq_train.sparse import SparseConvTensor


class Shelf:
    """Values with tensors, in any nested containers, sparse ones too.

    Tensors come back mapped from their file: what is not read takes no memory, and what is, the system can
    take back. A write to them stays with who wrote.

    Args:
        folder: Where the files are; nobody else's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._length = folder, 0

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[Shelf]:
        """A shelf that is gone with its files when the block is left; they are where TMPDIR says."""
        with TemporaryDirectory(prefix="cpq_train_") as folder:
            yield cls(Path(folder))

    def __len__(self) -> int:
        return self._length

    def append(self, value: Any) -> None:
        """Write a value.

        Raises:
            UserError: The disk is full.
        """
        file = self._file(self._length)
        with naming_full_disks("what blocks put out", self._folder), file.open("wb") as opened:
            _save(tree_map(_plain, value), opened)
        self._length += 1

    def __getitem__(self, number: int) -> Any:
        return torch.load(self._file(number), mmap=True, weights_only=False)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.pt"


def _save(value: Any, file: BinaryIO) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's own error comes in its place
            raise error.__context__ from None
        raise


def _plain(leaf: Any) -> Any:
    """Without what others noted on the tensor."""
    if isinstance(leaf, SparseConvTensor):
        return leaf.replace_feature(leaf.features.detach())
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
