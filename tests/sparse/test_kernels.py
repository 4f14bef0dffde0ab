"""Sparse convolutions on the CPU by our kernels, against spconv's, exact sums and fp64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_grids import grid_order, sparse_input
from torch import Tensor, nn

from cpq_train.common.kernels import HAS_VNNI, IS_FIT, MOST_CHANNELS
from cpq_train.sparse import (
    SparseConv3d,
    SparseConvTensor,
    SparseInverseConv3d,
    SubMConv3d,
    reference_kernels,
)
from cpq_train.sparse.rulebook import find_or_build, lists_of

if IS_FIT:
    from cpq_train.sparse.kernels import convolutions

pytestmark = pytest.mark.skipif(not IS_FIT, reason="no Numba, or a processor without fused multiply-add")

KINDS = ("submanifold", "strided", "inverse")


def _network(kind: str, num_in: int, num_out: int) -> nn.Module:
    """One convolution of a kind; an inverse one behind the strided one that it undoes."""
    torch.manual_seed(0)
    if kind == "submanifold":
        return SubMConv3d(num_in, num_out, 3, indice_key="a")
    if kind == "strided":
        return SparseConv3d(num_in, num_out, 3, stride=2, padding=1, indice_key="a")
    down = SparseConv3d(3, num_in, 3, stride=2, padding=1, indice_key="a")
    return nn.Sequential(down, SparseInverseConv3d(num_in, num_out, 3, indice_key="a"))


def _input(kind: str, num_in: int, fraction: float = 0.1) -> SparseConvTensor:
    """Its voxels are in any order."""
    x = sparse_input(3 if kind == "inverse" else num_in, fraction=fraction)
    order = torch.randperm(len(x.indices), generator=torch.Generator().manual_seed(0))
    return SparseConvTensor(x.features[order], x.indices[order].contiguous(), x.spatial_shape, x.batch_size)


def _results(network: nn.Module, x: SparseConvTensor) -> list[Tensor]:
    """The output by place, the gradient of the features by row and those of the parameters."""
    leaf = x.features.clone().requires_grad_()
    out = SparseConvTensor(leaf, x.indices, x.spatial_shape, x.batch_size)
    for layer in network if isinstance(network, nn.Sequential) else [network]:
        out = layer(out)
    features = out.features[grid_order(out)]
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    return [
        features.detach(),
        *torch.autograd.grad((features * probe).sum(), [leaf, *network.parameters()], materialize_grads=True),
    ]


# Numbers


@pytest.mark.parametrize("kind", KINDS)
@given(num_in=st.integers(1, MOST_CHANNELS + 20), num_out=st.integers(1, 70), fraction=st.floats(0.002, 0.3))
@settings(max_examples=25, deadline=None)
def test_outputs_are_the_bits_of_spconv(kind: str, num_in: int, num_out: int, fraction: float) -> None:
    network, x = _network(kind, num_in, num_out), _input(kind, num_in, fraction)
    ours = _results(network, x)
    with reference_kernels():
        theirs = _results(network, x)
    assert torch.equal(ours[0], theirs[0])
    exact = _results(network.double(), x.replace_feature(x.features.double()))
    for found, wanted in zip(ours[1:], exact[1:], strict=True):
        assert (found - wanted).norm() <= 1e-5 * (1 + wanted.norm())


def _sums(x_VC: Tensor, weight: Tensor, lists: Any) -> Tensor:
    """int64 sums of products of codes, pair by pair."""
    out = torch.zeros((lists.num_out, len(weight)), dtype=torch.int64)
    for cell, count in enumerate(lists.tiles_in[-1]):
        rows_in, rows_out = lists.rows_in[cell, :count].long(), lists.rows_out[cell, :count].long()
        out.index_add_(0, rows_out, x_VC[rows_in].long() @ weight.flatten(1, -2)[:, cell].long().T)
    return out


@pytest.mark.skipif(not HAS_VNNI, reason="a processor that does not multiply codes")
@pytest.mark.parametrize("kind", KINDS)
@given(
    num_in=st.integers(1, 70),
    num_out=st.integers(1, 70),
    x_codes=st.sampled_from([(0, 256), (255, 256), (0, 2)]),
    w_codes=st.sampled_from([(-128, 128), (-128, -127), (127, 128)]),
)
@settings(max_examples=15, deadline=None)
def test_sums_of_codes_are_exact(
    kind: str, num_in: int, num_out: int, x_codes: tuple[int, int], w_codes: tuple[int, int]
) -> None:
    network, x = _network(kind, num_in, num_out), _input(kind, num_in)
    layer = network[-1] if isinstance(network, nn.Sequential) else network
    if kind == "inverse":
        x = network[0](x)
    lists = lists_of(find_or_build(layer, x), kind == "inverse")
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(*x_codes, (len(x.indices), num_in), generator=generator).byte()
    weight = torch.randint(*w_codes, layer.weight.shape, generator=generator).float()
    sums = convolutions.convolve_codes(codes, convolutions.packed(weight), lists)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), _sums(codes, weight, lists))


# Tiles, threads and processes


def _of_numbers(kinds: tuple[str, ...] = KINDS) -> list[Tensor]:
    """Results for voxels of several tiles."""
    found = []
    for kind in kinds:
        found += _results(_network(kind, 24, 40), _input(kind, 24, fraction=0.95))
    return found


def _of_codes(num_in: int = 23, num_out: int = 40) -> Tensor:
    """Likewise sums of codes."""
    x = _input("submanifold", num_in, fraction=0.95)
    lists = lists_of(find_or_build(SubMConv3d(num_in, num_out, 3), x), inverse=False)
    assert len(lists.tiles_out) > 3
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(256, (len(x.indices), num_in), generator=generator).byte()
    weight = torch.randint(-128, 128, (num_out, 3, 3, 3, num_in), generator=generator).float()
    return convolutions.convolve_codes(codes, convolutions.packed(weight), lists)


@pytest.mark.parametrize("tile_bytes", [1, 2**18])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_no_bit_depends_on_the_number_of_threads(
    num_threads: int, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "TILE_BYTES", tile_bytes)
    expected = _of_numbers()
    with reference_kernels():
        assert torch.equal(_of_numbers()[0], expected[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert all(map(torch.equal, _of_numbers(), expected))


@pytest.mark.skipif(not HAS_VNNI, reason="a processor that does not multiply codes")
@pytest.mark.parametrize("num_threads", [2, 3])
def test_no_sum_of_codes_depends_on_it(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _of_codes()
    monkeypatch.setattr(convolutions, "TILE_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert torch.equal(_of_codes(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_tiles_have_an_output_in_common(kind: str) -> None:
    network, x = _network(kind, 4, 4), _input(kind, 4, fraction=0.95)
    layer = network
    if kind == "inverse":
        x, layer = network[0](x), network[1]
    lists = lists_of(find_or_build(layer, x), kind == "inverse")
    tile_of: dict[int, int] = {}
    for tile in range(len(lists.tiles_out) - 1):
        for cell in range(len(lists.rows_out)):
            pairs = slice(lists.tiles_out[tile, cell], lists.tiles_out[tile + 1, cell])
            for row in lists.rows_out[cell, pairs].tolist():
                assert tile_of.setdefault(row, tile) == tile


def test_a_fork_has_threads_of_its_own() -> None:
    """A process whose threads have computed, and its child, which has none of them."""
    code = """
import os, sys, warnings
import torch
torch.get_num_threads = lambda: 2
sys.path.insert(0, sys.argv[1])
import test_kernels
warnings.simplefilter("ignore")
expected = test_kernels._of_numbers()
child = os.fork()
if not child:
    same = all(map(torch.equal, test_kernels._of_numbers(), expected))
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = _run_code(code, {})
    assert done.returncode == 0, done.stderr


AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt,+f16c",
    "ATEN_CPU_CAPABILITY": "avx2",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a processor of another kind")
def test_two_processes_that_compile_at_once_for_short_vectors(tmp_path: Path) -> None:
    """The first that ever run here, on a processor with AVX2 alone."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_kernels
from test_kernels import convolutions
assert not convolutions.HAS_LONG_VECTORS
torch.save(test_kernels._of_numbers(test_kernels.KINDS[:1]), sys.argv[2])
print(*convolutions.loops.add_tiles.inspect_asm().values())  # of what it compiled itself
"""
    files = [tmp_path / "0.pt", tmp_path / "1.pt"]
    environment = {**os.environ, **AVX2, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)]
    running = [
        subprocess.Popen([*command, str(file)], env=environment, stdout=subprocess.PIPE, text=True)
        for file in files
    ]
    compiled = "".join(process.communicate(timeout=120)[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert "ymm" in compiled
    assert "zmm" not in compiled
    expected = _of_numbers(KINDS[:1])
    for file in files:
        for i, (found, ours) in enumerate(zip(torch.load(file), expected, strict=True)):
            assert (found - ours).norm() <= (1e-5 * ours.norm() if i else 0)


def _run_code(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
