"""Passes that end at a block: each sees what a whole pass sees, and no block is computed again."""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import files_of_at_most
from small_networks import NETWORKS, calibrated, run
from small_unet import SmallUNet, unet_inputs
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.ptq import adaround
from cpq_train.quantization.ptq.adaround import round_adaptively
from cpq_train.quantization.ptq.advance import Advance
from cpq_train.quantization.ptq.shelf import Shelf
from cpq_train.quantization.ptq.twins import ordered_tensors
from cpq_train.sparse import SparseConvTensor, adopt

BLOCKS = {"dense": ["0", "1", "2"], "sparse": ["0", "1"]}


class _FromTheStart:
    """The same by passes that compute everything."""

    def __init__(
        self, network: nn.Module, blocks: Any, forward: Callable[[nn.Module, Any], Any], shelf: Any
    ) -> None:
        self._network, self._forward = network, forward

    @torch.no_grad()
    def run_to(self, name: str, number: int, batch: Any) -> tuple[tuple[Any, ...], Any]:
        seen = []

        def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append((inputs, output))
            raise KeyError

        handle = self._network.get_submodule(name).register_forward_hook(record)
        with suppress(KeyError):
            self._forward(self._network, batch)
        handle.remove()
        return seen[0]


class _Joined(nn.Module):
    """No chain: a block that writes into its input, one of two calls, and a sum of what lies far back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.written = (
            nn.Conv2d(3, 4, 3),
            nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
        )
        self.twice, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        written = self.written(first)
        return self.last(torch.cat([self.twice(self.twice(written) + first), first], 1))


def _adopted_unet() -> nn.Module:
    network = SmallUNet()
    adopt(network)
    return network


NETWORKS_TO_PASS = {
    "dense": (NETWORKS["dense"][0], NETWORKS["dense"][1](), BLOCKS["dense"]),
    "sparse": (NETWORKS["sparse"][0], NETWORKS["sparse"][1](), BLOCKS["sparse"]),
    "joined": (
        *(_Joined, [torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(2)]),
        ["first", "written", "twice", "last"],
    ),
    "unet": (
        *(_adopted_unet, [unet_inputs(seed) for seed in range(2)]),
        ["enter", "down", "level1", "pool", "level2", "unpool", "mix", "up", "leave", "classify"],
    ),
}


def _forward(network: nn.Module, batch: Any) -> Any:
    return network(*batch) if isinstance(batch, tuple) else run(network, batch)


@pytest.mark.parametrize("kind", list(NETWORKS_TO_PASS))
def test_blocks_see_what_a_whole_pass_shows_them(kind: str) -> None:
    new_network, batches, blocks = NETWORKS_TO_PASS[kind]
    network = new_network().eval()
    plain = _FromTheStart(network, blocks, _forward, None)
    with Shelf.temporary() as shelf:
        passes = Advance(network, blocks, _forward, shelf)
        for name in blocks:
            for number, batch in enumerate(batches):
                expected, found = (p.run_to(name, number, batch) for p in (plain, passes))
                pairs = zip(ordered_tensors(expected), ordered_tensors(found), strict=True)
                assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", list(NETWORKS_TO_PASS))
def test_no_block_is_computed_again(kind: str) -> None:
    """Once to be looked at and once when it is done, whatever follows; unless it writes into its input."""
    new_network, (batch, *_), blocks = NETWORKS_TO_PASS[kind]
    network, computed = new_network().eval(), Counter[str]()
    for name in blocks:
        block = network.get_submodule(name)
        forward = type(block).forward

        def count(self: Any, *args: Any, name: str = name, forward: Any = forward) -> Any:
            computed[name] += 1
            return forward(self, *args)

        block.__class__ = type(type(block).__name__, (type(block),), {"forward": count})
    with Shelf.temporary() as shelf:
        passes = Advance(network, blocks, _forward, shelf)
        for name in blocks:
            passes.run_to(name, 0, batch)
    most = {"written": 3, "twice": 3}
    assert {n: c for n, c in computed.items() if c > most.get(n, 2)} == {}
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_rounding_is_that_of_passes_from_the_start(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    advancing, repeating = calibrated(kind), calibrated(kind)
    found = round_adaptively(advancing, BLOCKS[kind], 20)
    monkeypatch.setattr(adaround, "Advance", _FromTheStart)
    assert round_adaptively(repeating, BLOCKS[kind], 20) == found
    expected = repeating.network.state_dict()
    for name, value in advancing.network.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_shelf_gives_back_what_was_put_on_it() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x.note = nn.ReLU()
    coords = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    with Shelf.temporary() as shelf:
        shelf.append({"x": x, "more": (SparseConvTensor(torch.ones(1, 2), coords, [4, 4, 4], 1), 3)})
        for _ in range(2):
            (found,) = shelf
            assert torch.equal(found["x"], x)
            assert found["x"].stride() == x.stride()
            assert not hasattr(found["x"], "note")
            assert torch.equal(found["more"][0].indices, coords)
            assert found["more"][1] == 3
            found["x"].zero_()  # nobody else sees it


def test_nothing_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    twins = calibrated("sparse")
    round_adaptively(twins, BLOCKS["sparse"], 2)
    monkeypatch.setattr(twins.network[1], "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        round_adaptively(twins, BLOCKS["sparse"], 2)
    with Shelf.temporary() as shelf, files_of_at_most(10_000):
        shelf.append(torch.ones(10))
        with pytest.raises(UserError, match=r"cannot write what blocks put out .* bytes are free"):
            shelf.append(torch.ones(10_000))
    assert list(tmp_path.iterdir()) == []
