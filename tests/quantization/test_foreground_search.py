"""Ranges searched by their effect on the output."""

from collections import Counter

import torch
from small_networks import dense_batches, dense_network, run, scheme, twins_of
from torch import Tensor, nn

from cpq_train.quantization.ptq.range_search import FRACTIONS, search_ranges
from cpq_train.quantization.switches import quantizers

SEARCHED = scheme(weight={"bits": 8}, input={"bits": 4, "method": "foreground"})


def _objective(wanted: Tensor, output: Tensor) -> Tensor:
    return (output - wanted).square().mean()


def _batches_with_an_outlier() -> list[Tensor]:
    batches = dense_batches()
    batches[0][0, 0, 0, 0] = 40.0
    return batches


def test_the_objective_falls() -> None:
    twins = twins_of(dense_network(), _batches_with_an_outlier(), SEARCHED)
    ranges = {n: float(q.amax) for n, q in quantizers(twins.network).items() if "_input_" in n}
    assert ranges["0.0._input_quantizer"] == 40.0

    def error() -> float:
        pairs = [[run(n, x) for n in (twins.float_network, twins.network)] for x in twins.batches]
        return sum(float(_objective(*pair)) for pair in pairs)

    before = error()
    kept = search_ranges(twins, _objective)
    assert error() < 0.9 * before
    assert kept.keys() == ranges.keys()
    assert kept["0.0._input_quantizer"] < 1.0
    for name, fraction in kept.items():
        assert fraction in FRACTIONS
        amax = quantizers(twins.network)[name].amax
        torch.testing.assert_close(amax, torch.tensor(ranges[name] * fraction), rtol=1e-6, atol=0)
    assert not any(q._disabled for q in quantizers(twins.network).values())


def test_one_quantizer_ends_at_the_best_fraction() -> None:
    twins = twins_of(nn.Sequential(nn.Conv2d(4, 4, 1)), _batches_with_an_outlier(), SEARCHED)
    quantizer = quantizers(twins.network)["0._input_quantizer"]
    errors = {}
    for fraction in FRACTIONS:
        quantizer._amax.fill_(40.0 * fraction)
        errors[fraction] = sum(
            float(_objective(run(twins.float_network, x), run(twins.network, x))) for x in twins.batches
        )
    quantizer._amax.fill_(40.0)
    assert search_ranges(twins, _objective)["0._input_quantizer"] == min(errors, key=errors.__getitem__)


def test_other_methods_are_left_alone() -> None:
    twins = twins_of(dense_network(), dense_batches(), scheme(input={"method": "max"}))
    assert search_ranges(twins, _objective) == {}


def test_a_search_from_block_to_block_finds_the_same() -> None:
    """And computes a block, once it is done, no more than once for each batch."""
    found, computed = [], []
    for blocks in ([], ["0", "1", "2"]):
        twins = twins_of(dense_network(), _batches_with_an_outlier(), SEARCHED)
        layer, calls = twins.network.get_submodule("0.0"), Counter[str]()
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["0"]))
        kept = search_ranges(twins, _objective, blocks)
        found.append((kept, {name: q.amax.tolist() for name, q in quantizers(twins.network).items()}))
        computed.append(calls["0"])
    assert found[0] == found[1]
    most_of_one = 2 * len(FRACTIONS)
    assert computed[1] <= most_of_one + 2 < computed[0]
