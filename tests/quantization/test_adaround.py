"""Learned rounding: better than the nearest, on the grid, and undone where it is worse."""

import copy
from typing import Any

import pytest
import torch
from small_networks import NETWORKS, calibrated, dense_batches, run, scheme, twins_of
from torch import nn

from cpq_train.quantization.ptq import adaround
from cpq_train.quantization.ptq.adaround import round_adaptively
from cpq_train.quantization.ptq.twins import squared_error

BLOCKS = {"dense": ["0", "1", "2"], "sparse": ["0", "1"]}


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_block_gets_nearer_to_its_float_output(kind: str, granularity: str) -> None:
    twins = calibrated(kind, scheme(weight={"granularity": granularity}))
    results = round_adaptively(twins, BLOCKS[kind], 200)
    assert [r.block for r in results] == BLOCKS[kind]
    assert results[0].learned < 0.9 * results[0].nearest
    assert all(r.learned < r.nearest for r in results)


@pytest.mark.parametrize("bias", ["float", "accumulator"])
def test_the_whole_network_gets_nearer(bias: str) -> None:
    twins = calibrated("dense", scheme(bias=bias))

    def error() -> float:
        pairs = [[run(n, x) for n in (twins.network, twins.float_network)] for x in twins.batches]
        return sum(float(squared_error(*pair).detach()) for pair in pairs)

    before = error()
    round_adaptively(twins, BLOCKS["dense"], 200)
    assert error() < 0.9 * before


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_nearest_rounding_finds_the_learned_codes(bits: int, granularity: str) -> None:
    """Bit for bit, for codes drawn anew up and down, with amax as it was and a channel that is all zero."""
    layer = nn.Conv2d(16, 8, 3)
    with torch.no_grad():
        layer.weight[3].zero_()
    twins = twins_of(
        nn.Sequential(layer),
        [torch.randn(1, 16, 5, 5)],
        scheme(weight={"bits": bits, "granularity": granularity}),
    )
    conv: Any = twins.network[0]
    amax = conv._weight_quantizer.amax.clone()
    floor = (conv.weight.detach() * conv._weight_quantizer.range_of(conv.weight).scale).floor()
    rounding = adaround._Rounding(conv)
    up = torch.rand_like(rounding.logits) < 0.5
    with torch.no_grad():
        rounding.logits.copy_(torch.where(up, 3.0, -3.0))
        conv.weight.copy_(rounding.hard())
    expected = (floor + up).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if granularity == "per_channel":
        expected[3] = 0
    codes, step = conv._weight_quantizer.codes(conv.weight)
    assert torch.equal(codes, expected)
    # Where a code is 0, no step is on the grid; elsewhere the value is code times step, rounded once.
    assert torch.equal(conv.weight, torch.where(expected == 0, 0.0, expected * step))
    assert torch.equal(conv._weight_quantizer.amax, amax)


def test_soft_rounding_starts_at_the_weight() -> None:
    conv: Any = calibrated("dense").network[0][0]
    torch.testing.assert_close(adaround._Rounding(conv).soft(), conv.weight, rtol=0, atol=1e-6)


def test_only_weights_change() -> None:
    twins = calibrated("dense")
    before = copy.deepcopy(twins.network.state_dict())
    round_adaptively(twins, BLOCKS["dense"], 20)
    for name, value in twins.network.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.endswith("weight")), name
    assert all(q._disabled is False for n, q in twins.network.named_modules() if n.endswith("_quantizer"))
    assert all(p.grad is None for p in twins.network.parameters())


def test_a_block_that_would_get_worse_keeps_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaround._Rounding, "hard", lambda self: torch.zeros_like(self._floor))
    twins = calibrated("dense")
    before = twins.network[0][0].weight.detach().clone()
    (result,) = round_adaptively(twins, ["0"], 2)
    assert not result.is_kept
    assert torch.equal(twins.network[0][0].weight, before)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"a": self.a(x), "more": [self.b(x)]}


def test_blocks_with_several_outputs() -> None:
    torch.manual_seed(0)
    twins = twins_of(nn.Sequential(_Branches()), dense_batches(), scheme())
    (result,) = round_adaptively(twins, ["0"], 200)
    assert result.learned < 0.9 * result.nearest


def test_blocks_without_codes_are_left_alone() -> None:
    for weight in ({"mode": "off"}, {"mode": "dynamic"}, {"format": "fp8_e4m3", "bits": 8}):
        twins = calibrated("dense", scheme(weight=weight))
        assert round_adaptively(twins, BLOCKS["dense"], 5) == []
