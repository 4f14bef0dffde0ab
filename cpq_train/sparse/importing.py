"""The import of spconv, which may cost more than all else that a command does before it starts.

For CUDA, spconv 2.3 makes some 10 million objects of its tables of kernels. Where there is no GPU nothing
reads them, and they stay empty. Where there is one, they are not searched for garbage while they are made.
Deep inside other imports the many small calls that make them may lie across the end of a piece of Python's
stack, which is then got and given back at each of them; so the command line imports `cpq_train.sparse` first
(`docs/performance.md`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from cpq_train.common.collection import collection_paused

_TABLES = ("ALL_NATIVE_PARAMS", "ALL_IMPGEMM_PARAMS")
"""Of `spconv.core`: what `spconv.algo` tries on a GPU, read as it is imported."""


@contextmanager
def importing_spconv() -> Iterator[None]:
    """While open, spconv is imported without what the machine has no use for.

    That is its tables of CUDA kernels where this process sees no GPU, the search for garbage, and warnings of
    its own old names. GPUs that are hidden from this process now (`CUDA_VISIBLE_DEVICES`) have to stay so.
    """
    with collection_paused(), warnings.catch_warnings():
        # It decorates its kernels with torch.cuda.amp's old names: nine warnings on import.
        warnings.filterwarnings("ignore", message=".*torch.cuda.amp.custom_", category=FutureWarning)
        # Counting devices leaves CUDA uninitialised, so that this process can still fork.
        with nullcontext() if torch.cuda.device_count() else _empty_tables():
            yield


@contextmanager
def _empty_tables() -> Iterator[None]:
    import spconv.core

    tables = {name: getattr(spconv.core, name) for name in _TABLES}
    vars(spconv.core).update({name: [] for name in _TABLES})
    try:
        yield
    finally:
        vars(spconv.core).update(tables)
