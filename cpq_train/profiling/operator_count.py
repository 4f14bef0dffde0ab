"""Operators that a piece of work issues, and those of them that make the host wait for a GPU.

Counted where PyTorch dispatches them, so that a CPU tells what a GPU would be given: in
`cpq_train.common.kernels.as_on_gpu`, which takes a GPU's path. An operator of this project's own counts once,
as the one kernel that it is on a GPU; what spconv launches is not PyTorch's and does not count.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).resolve().parents[1]

_TORCH = Path(torch.__file__).parent
OPTIMIZERS = str(_TORCH / "optim")
BETWEEN = (str(_TORCH / "_dynamo"), str(_TORCH / "_compile"))
"""Between whoever calls an operator and a mode that sees it."""

SPCONV_FILES = ("spconv/pytorch/functional.py", "spconv/pytorch/ops.py")
MOST_FRAMES = 16
"""Between an operator that spconv issues and spconv; all frames are many to look at for every operator."""

FREE = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "as_strided"),
        *("unsqueeze", "squeeze", "detach", "alias", "split", "split_with_sizes", "unbind", "reshape"),
        *("_reshape_alias", "unfold", "lift_fresh", "set_", "resize_", "diagonal"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)
"""Views and memory: nothing runs on a GPU."""

WAITING = frozenset(
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "nonzero_numpy", "equal", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
        "lift_fresh",  # numbers of Python on their way to the device, through memory that is not pinned
    )
)
"""The host waits for their result, or until they are done."""


@dataclass
class Count:
    """What was counted.

    Attributes:
        operators: Operator -> how often.
        waits: Operator, and where it was called from -> how often the host had to wait for it.
    """

    operators: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def num_operators(self) -> int:
        """All of them."""
        return self.operators.total()

    @property
    def num_waits(self) -> int:
        """All of them."""
        return self.waits.total()


@contextmanager
def counting_operators() -> Iterator[Count]:
    """Count what is dispatched while open, backward passes too."""
    count = Count()
    with _Counting(count):
        yield count


class _Counting(TorchDispatchMode):
    def __init__(self, count: Count) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if _is_of_spconv() or (name in WAITING and _is_of_an_optimizer()):
            return func(*args, **kwargs)
        if _waits(name, args, kwargs):
            self._count.waits[name, calling_place(traceback.extract_stack())] += 1
        if name not in FREE:
            self._count.operators[name] += 1
        return func(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        indices = args[1]
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
    if name == "aten::repeat_interleave":  # its size is the sum of the repeats
        return kwargs.get("output_size") is None
    return name in WAITING


def _is_of_spconv() -> bool:
    """Whether one of spconv's functions is at work: on a GPU its kernels are not PyTorch's."""
    frame: FrameType | None = sys._getframe()
    for _ in range(MOST_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(SPCONV_FILES):
            return True
        frame = frame.f_back
    return False


def _is_of_an_optimizer() -> bool:
    """Whether PyTorch's optimizer asked itself: its counts of steps are on the host."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(BETWEEN):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(OPTIMIZERS)


def calling_place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of this package in a stack, else of whoever called.

    Args:
        frames: The stack, outermost first.

    Returns:
        File, below the folder of the package where it is one of it, and line.
    """
    frames = [f for f in frames if f.filename != __file__]
    ours = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)]
    if ours:
        return f"{Path(ours[-1].filename).relative_to(PACKAGE.parent)}:{ours[-1].lineno}"
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}"
