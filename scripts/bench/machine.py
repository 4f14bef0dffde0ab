"""The machine that is measured on: its settings, alike for all scripts, and what it is."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cpq_train.common.memory import keep_freed_memory

INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "VNNI": "avx512_vnni",
    "BF16": "avx512_bf16",
    "AMX": "amx_tile",
}
"""Name -> flag of /proc/cpuinfo."""

PACKAGES = ("torch", "spconv-cu120", "spconv-cu126", "numba", "pytorch-quantization")
CPU_INFO = Path("/proc/cpuinfo")


def settle(threads: int = 1) -> None:
    """Before anything is measured: so many threads, and freed memory is kept.

    Else the order of what takes turns decides which of it hands memory back, and fetches it again page by
    page.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()


def machine_name(device: str = "cpu") -> str:
    """Model of the processor, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return _cpu_info().get("model name") or platform.machine()


def describe(device: str = "cpu") -> dict[str, Any]:
    """What is written beside every measurement."""
    flags = _cpu_info().get("flags", "").split()
    return {
        "machine": machine_name(device),
        "instruction_sets": [name for name, flag in INSTRUCTION_SETS.items() if flag in flags],
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_info() -> dict[str, str]:
    """Of the first processor."""
    if not CPU_INFO.is_file():
        return {}
    first = CPU_INFO.read_text().split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
