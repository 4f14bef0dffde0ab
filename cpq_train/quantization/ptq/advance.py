"""Forward passes that compute nothing again of the blocks that a method is done with.

What these put out for a batch does not change any more: it is kept on a `Shelf` and given back in later
passes, in which only what lies between them is computed. So blocks may be connected in any way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from cpq_train.quantization.ptq.shelf import Shelf
from cpq_train.quantization.scope import version_of
from cpq_train.sparse import SparseConvTensor


class _Stop(Exception):
    """Ends a forward pass behind the block of interest."""


class Advance:
    """Passes of one network, in evaluation mode.

    Args:
        network: A block of it changes only until a pass in which it is done.
        blocks: Their names, in the order in which they run.
        forward: Runs it on one batch.
        shelf: For outputs of blocks.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[str],
        forward: Callable[[nn.Module, Any], Any],
        shelf: Shelf,
    ) -> None:
        self._network, self._blocks, self._forward, self._shelf = network, list(blocks), forward, shelf
        self._places: dict[tuple[str, int, int], int] = {}
        self._keeps_rulebooks = any(getattr(module, "inverse", False) for module in network.modules())

    @torch.no_grad()
    def run(self, num_done: int, number: int, batch: Any) -> Any:
        """The network's output for a batch.

        Args:
            num_done: So many of the first blocks do not change any more.
            number: Of the batch, always the same.
            batch: The batch.
        """
        with ExitStack() as stack:
            for name in self._blocks[:num_done]:
                stack.enter_context(self._computed_once(name, number))
            return self._forward(self._network, batch)

    def run_to(self, name: str, number: int, batch: Any) -> tuple[tuple[Any, ...], Any]:
        """Inputs and output of a block in its first call of a pass, the blocks before it being done.

        Args:
            name: Of the block.
            number: Of the batch, always the same.
            batch: The batch.
        """
        seen: list[tuple[tuple[Any, ...], Any]] = []

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append((inputs, output))
            raise _Stop

        handle = self._network.get_submodule(name).register_forward_hook(record)
        try:
            with suppress(_Stop):
                self.run(self._blocks.index(name), number, batch)
        finally:
            handle.remove()
        return seen[0]

    @contextmanager
    def _computed_once(self, name: str, number: int) -> Iterator[None]:
        """While open, a block gives back what it put out for a batch in an earlier pass, call by call."""
        block, calls = self._network.get_submodule(name), Counter[str]()
        compute = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            key = (name, number, calls[name])
            if key in self._places:
                return self._shelf[self._places[key]]
            before = _versions((args, kwargs))
            output = compute(*args, **kwargs)
            if _versions((args, kwargs)) == before:  # what writes into its input has to do it every time
                self._places[key] = len(self._shelf)
                self._shelf.append(output if self._keeps_rulebooks else tree_map(_without_rulebooks, output))
            return output

        block.forward = forward
        try:
            yield
        finally:
            del block.forward


def _versions(values: Any) -> list[int]:
    leaves = (v.features if isinstance(v, SparseConvTensor) else v for v in tree_leaves(values))
    return [version_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)]


def _without_rulebooks(leaf: Any) -> Any:
    """Several times as large as the features, and soon found again; only inverse layers need old ones."""
    if not isinstance(leaf, SparseConvTensor):
        return leaf
    leaf = leaf.replace_feature(leaf.features)
    leaf.indice_dict = {}
    return leaf
