"""Where our kernels cannot run, others compute: the same bits of outputs, gradients but for rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_networks import NETWORKS, calibrated, run
from torch import Tensor

import cpq_train
from cpq_train.common import kernels
from cpq_train.quantization.layers import sparse
from cpq_train.quantization.numerics import int8_kernel
from cpq_train.sparse import SparseConvTensor, reference_kernels

pytestmark = pytest.mark.skipif(not kernels.IS_FIT, reason="no Numba, or no fused multiply-add")


class Found(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]

    def check(self, expected: Found) -> None:
        assert all(map(torch.equal, self.outputs, expected.outputs))
        for theirs, ours in zip(self.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6 * float(ours.abs().max()))


def steps() -> Found:
    """Two training steps and an evaluation of small networks, dense and sparse."""
    found = Found([], [])
    for kind in NETWORKS:
        twins = calibrated(kind)
        for is_training in (True, True, False):
            out = _by_place(run(twins.network.train(is_training), twins.batches[0]))
            found.outputs.append(out.detach())
            if is_training:
                out.square().sum().backward()
        found.gradients.extend(p.grad for p in twins.network.parameters() if p.grad is not None)
    return found


def _by_place(out: Any) -> Tensor:
    """Features of a sparse tensor in the order of their places: that of voxels is up to the kernels."""
    if not isinstance(out, SparseConvTensor):
        return out
    return out.features[(out.indices.long() @ torch.tensor([1000, 100, 10, 1])).argsort()]


@pytest.fixture(scope="module")
def expected() -> Found:
    """By our kernels."""
    return steps()


def test_reference_kernels(expected: Found) -> None:
    with reference_kernels():
        steps().check(expected)


def test_a_processor_without_fused_multiply_add(expected: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "IS_FIT", False)
    steps().check(expected)


def test_a_processor_that_does_not_multiply_codes(expected: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "HAS_VNNI", False)
    monkeypatch.setattr("cpq_train.sparse.kernels.convolutions.convolve_codes", None)  # not called
    monkeypatch.setattr(int8_kernel, "IS_AVAILABLE", False)
    steps().check(expected)


@pytest.fixture
def asked_again() -> Iterator[None]:
    """Whether Numba can be imported is asked in the test, and again behind it."""
    kernels._is_numba_whole.cache_clear()
    yield
    kernels._is_numba_whole.cache_clear()


def test_a_numba_that_does_not_fit_numpy(
    expected: Found, asked_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.9.")

    monkeypatch.setattr(kernels, "import_module", refuse)
    with pytest.warns(UserWarning, match=r"no use here, .* slower: Numba needs NumPy 2\.4") as warned:
        steps().check(expected)
    assert len(warned) == 1


def _run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_numba(expected: Found, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(cpq_train.__file__).parents[1])!r}]
import torch, test_fallbacks
torch.save(tuple(test_fallbacks.steps()), "found.pt")
"""
    done = _run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    Found(*torch.load(tmp_path / "found.pt")).check(expected)


def test_nowhere_to_keep_what_was_compiled(tmp_path: Path) -> None:
    """Files are in the place of the folders that Numba would write to."""
    package = tmp_path / "cpq_train"
    shutil.copytree(Path(cpq_train.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "quantization/numerics/__pycache__").touch()
    code = """
import torch
from cpq_train.quantization.numerics import one_pass
codes = one_pass.encoded(torch.tensor([0.0, 0.7, 9.0]), torch.tensor(10.0), one_pass.IntegerFormat(4))
print(one_pass.__file__, codes.tolist())
"""
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path)}
    done = _run(code, tmp_path, NUMBA_CACHE_DIR="/dev/null/none", **nowhere)
    assert done.stdout.split(maxsplit=1) == [f"{package}/quantization/numerics/one_pass.py", "[0, 7, 7]\n"]
    assert done.stderr.count("kernels are compiled again in every process") == 1
