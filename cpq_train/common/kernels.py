"""Whether our kernels compute, or those of spconv and PyTorch, which are their reference."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

_switched_off = 0
_as_on_gpu = 0


def _is_fit() -> bool:
    """Without Numba there is nothing to run; without fused multiply-add it would be slow."""
    has_fma = platform.machine() in ("arm64", "aarch64") or torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )
    return has_fma and find_spec("numba") is not None


@cache
def _is_numba_whole() -> bool:
    """Whether Numba can be imported, which it refuses beside a NumPy that is too new for it."""
    try:
        import_module("numba")
    except (ImportError, OSError) as error:
        warnings.warn(f"Numba is of no use here, so that steps are slower: {error}", stacklevel=2)
        return False
    return True


IS_FIT = _is_fit()
"""Whether this machine can run them."""

HAS_VNNI = bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
"""Whether it multiplies 8-bit codes."""

HAS_BF16 = any(
    bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()) for name in ("avx512_bf16", "amx_tile")
)
"""Whether it multiplies numbers in bf16."""

MOST_CHANNELS = 192
"""Of a float layer's input, up to which MKL, which spconv calls, adds the products of a cell one after the
other, as our kernels do: beyond, last bits would differ."""


def are_reference() -> bool:
    """Whether the reference is asked for."""
    return _switched_off > 0


def are_on() -> bool:
    """Whether they compute now; imports Numba, which takes a second."""
    return IS_FIT and not are_reference() and _is_numba_whole()


@contextmanager
def reference_kernels() -> Iterator[None]:
    """While open, spconv's and PyTorch's kernels compute: to compare with, for a test or a measurement."""
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1


def are_numbers_at_hand(device: torch.device) -> bool:
    """Whether the host may look at numbers on a device without waiting for it."""
    return device.type == "cpu" and not _as_on_gpu


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """While open, the CPU takes the path of a GPU: the reference's kernels, and no number is looked at early.

    For tests, and to count what a GPU would be given.
    """
    global _as_on_gpu
    _as_on_gpu += 1
    try:
        with reference_kernels():
            yield
    finally:
        _as_on_gpu -= 1
