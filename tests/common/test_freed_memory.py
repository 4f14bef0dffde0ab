"""What becomes of memory that arrays have left."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cpq_train.common import memory
from cpq_train.common.memory import keep_freed_memory

FAULTS = """
import resource, numpy as np
from cpq_train.common.memory import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        np.ones(48 << 17)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
"""Page faults of five arrays of 48 MiB, one after the other: above what glibc itself comes to keep."""


def _environment(**settings: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    others.pop("GLIBC_TUNABLES", None)
    return {**others, **settings}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_the_next_array_gets_pages_that_are_there() -> None:
    environments = [
        _environment(),
        _environment(MALLOC_MMAP_THRESHOLD_="131072"),
        _environment(GLIBC_TUNABLES="glibc.malloc.mmap_threshold=131072"),
    ]
    programs = [
        subprocess.Popen([sys.executable, "-c", FAULTS], env=environment, stdout=subprocess.PIPE)
        for environment in environments
    ]
    ours, *own_settings = [int(program.communicate()[0]) for program in programs]
    assert ours < 20
    assert min(own_settings) > 100


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What glibc before 2.35 is asked for, which takes no threshold above 32 MiB."""
    calls: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return int(name != -3 or value <= 2**25)

    for name in [*filter(lambda name: name.startswith("MALLOC_"), os.environ), "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    return calls


def test_an_old_glibc_keeps_what_it_can(asked: list[tuple[int, int]]) -> None:
    """Refused and not asked again, it would fall back to 128 KiB: the threshold no longer adapts."""
    keep_freed_memory()
    assert asked == [(-1, 2**30), (-3, 2**30), (-3, 2**25)]


@pytest.mark.parametrize(
    ("name", "value", "is_asked"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "0", False),
        ("MALLOC_ARENA_MAX", "1", False),
        ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2:glibc.malloc.top_pad=1", False),
        ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2", True),
    ],
)
def test_own_settings_stay(
    name: str, value: str, is_asked: bool, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    keep_freed_memory()
    assert bool(asked) == is_asked


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_freed_memory()
