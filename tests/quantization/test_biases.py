"""Biases as engines have them: whole multiples of the step of a sum, and half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import dense_batches, dense_network
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics.biases import (
    FITTED_BIAS_CODE,
    STEP_OF_ZERO_CHANNEL,
    bias_codes,
)
from cpq_train.quantization.prepare import prepare, remove_quantizers
from cpq_train.quantization.ranges.bias_steps import bias_problems, widen_steps
from cpq_train.quantization.ranges.calibration import check_ranges, collecting_ranges
from cpq_train.quantization.ranges.policy import apply_policy, finish_observing, start_observing
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.sparse import SparseConvTensor, SubMConv3d

W8, A8 = QuantizerScheme(granularity="per_channel"), QuantizerScheme()
KINDS = ("float", "accumulator", "fp16")


def _quantized(layer: nn.Module, bias: Any, x: Any, weight: Any = W8, input: Any = A8, **more: Any) -> Any:
    quantize_layer(layer, LayerScheme(weight, input, bias=bias, **more))
    with collecting_ranges(layer):
        layer(x)
    return layer


def _conv(num_in: int = 6, num_out: int = 5, seed: int = 0, size: int = 3) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(num_in, num_out, size, padding=size // 2)


def _map(num_in: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(2, num_in, 9, 7, generator=torch.Generator().manual_seed(seed)).relu()


def _by_hand(layer: Any, x: Tensor) -> np.ndarray[Any, Any]:
    """The layer in Python's whole numbers: sums, codes of the bias, one rounding to fp32, one product."""
    step_x, step_w = (
        layer._input_quantizer.range_of(x).step,
        layer._weight_quantizer.range_of(layer.weight).step,
    )
    codes = [
        q.codes(t)[0].double()
        for q, t in ((layer._input_quantizer, x), (layer._weight_quantizer, layer.weight))
    ]
    sums = nn.functional.conv2d(*codes, padding=layer.padding).detach().numpy().astype(np.int64)
    unit = (step_x * step_w.reshape(-1)).numpy()
    exact = layer.bias.detach().double().numpy() / unit.astype(np.float64)
    codes_of_bias = np.rint(exact).astype(np.float32).astype(np.int64)
    total = sums + codes_of_bias[None, :, None, None]
    return total.astype(np.float32) * unit[None, :, None, None]


def _assert_verified(network: nn.Module, *inputs: Any) -> None:
    for report in verify_layers(network, inputs):
        assert not report.not_covered
        assert report.num_sums > 0
        assert report.num_mismatched == 0, report


@pytest.mark.parametrize(
    ("bias", "unit", "code"),
    [
        (0.0, 0.25, 0),
        (1.0, 0.25, 4),
        (0.375, 0.25, 2),  # ties go to the even one
        (0.625, 0.25, 2),
        (-0.376, 0.25, -2),
        (1e-9, 0.25, 0),
        (3.0e8, 1.0, 300000000),
        (2.0**24 + 2, 1.0, 2**24 + 2),
        (1e30, 1e-30, 2**30),
        (-1e30, 1e-30, -(2**30)),
    ],
)
def test_codes(bias: float, unit: float, code: int) -> None:
    found = bias_codes(torch.tensor([bias]), torch.tensor([unit]))
    assert found.dtype == torch.float32
    assert int(found) == code


def test_codes_are_whole_numbers_that_fp32_holds() -> None:
    found = bias_codes(torch.tensor([0.1, 7.7]), torch.tensor([1e-9, 1e-8])).double()
    assert torch.equal(found, found.round())
    assert torch.equal(found, found.float().double())
    assert (
        found / (torch.tensor([0.1, 7.7]).double() / torch.tensor([1e-9, 1e-8]).double()) - 1
    ).abs().max() < 1e-7


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_an_accumulator_bias_is_added_to_the_sum(bits: int) -> None:
    x = _map()
    layer = _quantized(_conv(), "accumulator", x, QuantizerScheme(granularity="per_channel", bits=bits))
    with torch.no_grad():
        y = layer(x)
    assert np.array_equal(y.numpy(), _by_hand(layer, x))
    plain = _quantized(_conv(), "float", x, QuantizerScheme(granularity="per_channel", bits=bits))
    largest_move = (
        layer._input_quantizer.range_of(x).step * layer._weight_quantizer.range_of(x).step
    ).max() / 2
    assert 0 < (y - plain(x)).abs().max() <= largest_move * 1.001


@pytest.mark.parametrize(("num_in", "scale"), [(6, 1.0), (600, 1.0), (600, 1e3)])
@pytest.mark.parametrize("signed", [True, False])
def test_sums_beyond_what_fp32_holds(num_in: int, scale: float, signed: bool) -> None:
    """A total beyond 2^24 is rounded once, wherever the bias's code stands: one addition more would show."""
    layer, x = _conv(num_in), _map(num_in)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.sign() * (1 + 0.01 * layer.weight))
        layer.weight[:2].abs_()
        layer.bias.copy_(torch.tensor([0.3, -2.0, 5.0, 70.0, 0.01]) * scale)
    layer = _quantized(layer, "accumulator", x, input=QuantizerScheme(signed=signed))
    with torch.no_grad():
        y = layer(x)
    expected = _by_hand(layer, x)
    assert np.array_equal(y.numpy(), expected)
    unit = layer._input_quantizer.range_of(x).step * layer._weight_quantizer.range_of(x).step.reshape(-1)
    assert scale == 1 or float((y.abs().amax((0, 2, 3)) / unit).max()) > 2**24
    _assert_verified(layer, x)


def test_half_precision() -> None:
    x = _map()
    layer, plain = _quantized(_conv(), "fp16", x), _conv()
    with torch.no_grad():
        plain.bias.copy_(plain.bias.half())
    assert not torch.equal(plain.bias, layer.bias)
    assert torch.equal(layer(x), _quantized(plain, "float", x)(x))
    _assert_verified(layer, x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["accumulator", "fp16"])
def test_gradients_are_those_of_a_float_bias(kind: str, shared: bool) -> None:
    x = _map()
    found = []
    for bias in ("float", kind):
        layer, leaf = _quantized(_conv(), bias, x), x.clone().requires_grad_()
        layer._input_quantizer.num_readers = 2 if shared else 1
        weights = torch.linspace(-1, 1, 2 * 5 * 9 * 7).view(2, 5, 9, 7)
        found.append(torch.autograd.grad((layer(leaf) * weights).sum(), (leaf, layer.weight, layer.bias)))
    for ours, plain in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("kind", ["accumulator", "fp16"])
def test_gradients_of_a_sparse_layer(kind: str) -> None:
    coords = torch.cartesian_prod(*[torch.arange(3)] * 3).int()
    coords = nn.functional.pad(coords, (1, 0))
    features = torch.randn(27, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for bias in ("float", kind):
        torch.manual_seed(0)
        leaf = features.clone().requires_grad_()
        layer = SubMConv3d(6, 5, 3, padding=1, bias=True, indice_key="k")
        nn.init.normal_(layer.bias)
        layer = _quantized(layer, bias, SparseConvTensor(features, coords, [3, 3, 3], 1))
        out = layer(SparseConvTensor(leaf, coords, [3, 3, 3], 1)).features
        loss = (out * torch.linspace(-1, 1, 27 * 5).view(27, 5)).sum()
        found.append((out.detach(), *torch.autograd.grad(loss, (leaf, layer.weight, layer.bias))))
    assert not torch.equal(found[0][0], found[1][0])
    for ours, plain in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_channel_of_zeros_keeps_its_bias(granularity: Any) -> None:
    layer, x = _conv(), _map()
    with torch.no_grad():
        (layer.weight[3] if granularity == "per_channel" else layer.weight).zero_()
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0123, -0.7]))
    quantize_layer(layer, LayerScheme(QuantizerScheme(granularity=granularity), A8, bias="accumulator"))
    with collecting_ranges(layer, on_unfit=lambda problems: None):
        layer(x)
    step_x = float(layer._input_quantizer.range_of(x).step)
    moved = (layer(x)[:, 3] - layer.bias[3]).abs().max()
    assert moved <= step_x * STEP_OF_ZERO_CHANNEL / 2 * 1.001
    assert not bias_problems(layer)
    _assert_verified(layer, x)


def _with_dead_channels(widens: bool = False, bias: Any = "accumulator", weight: Any = W8) -> Any:
    """Channels 1 and 4 have next to no weights, and a bias like the others."""
    layer = _conv()
    with torch.no_grad():
        layer.weight[[1, 4]] *= 1e-6
        layer.bias.copy_(torch.tensor([0.1, 0.9, 0.3, 0.0123, -0.7]))
    return _quantized(layer, bias, _map(), weight, widens_steps=widens)


def test_a_step_too_small_for_its_bias_is_refused_by_name() -> None:
    network = nn.Sequential(_with_dead_channels())
    said = (
        r"0\._weight_quantizer +Conv2d +step too small for the bias; accepted: on_small_step: widen, or "
        r"bias: float +2 of 5, channels 1, 4"
    )
    with pytest.raises(UserError, match=rf"1 layers cannot hold their bias:(.|\n)*{said}"):
        check_ranges(network)
    assert widen_steps(network) == {}


def test_a_float_bias_asks_nothing_of_its_step() -> None:
    assert check_ranges(nn.Sequential(_with_dead_channels(bias="float"))) == 0


def test_a_step_too_small_is_widened_where_the_scheme_says_so() -> None:
    layer, x = _with_dead_channels(widens=True), _map()
    before, network = layer._weight_quantizer.amax.clone(), nn.Sequential(layer)
    assert widen_steps(network) == {"0": [1, 4]}
    amax = layer._weight_quantizer.amax
    assert torch.equal(amax[[0, 2, 3]], before[[0, 2, 3]])
    assert (amax[[1, 4]] > before[[1, 4]] * 10).all()
    assert check_ranges(network) == 0
    unit = layer._input_quantizer.range_of(x).step * layer._weight_quantizer.range_of(
        layer.weight
    ).step.reshape(-1)
    codes = bias_codes(layer.bias, unit).abs()
    assert (codes[[1, 4]] / FITTED_BIAS_CODE - 1).abs().max() < 1e-5
    moved = (layer(x) - _with_dead_channels(bias="float")(x)).abs().amax((0, 2, 3))
    assert moved[[1, 4]].max() < 1e-4
    _assert_verified(network, x)
    assert widen_steps(network) == {}


def test_a_step_for_the_whole_weight_is_widened_for_its_largest_bias() -> None:
    _widened(_conv(), QuantizerScheme(granularity="per_tensor"))


def test_a_step_for_the_channels_of_all_groups_is_widened_for_the_largest_of_their_biases() -> None:
    torch.manual_seed(0)
    network = _widened(nn.ConvTranspose2d(6, 8, 2, 2, groups=2), W8)
    assert network[0]._weight_quantizer.amax.numel() == 4


def _widened(layer: nn.Module, weight: QuantizerScheme) -> nn.Sequential:
    with torch.no_grad():
        layer.weight *= 1e-6
    network = nn.Sequential(_quantized(layer, "accumulator", _map(), weight, widens_steps=True))
    (channels,) = widen_steps(network).values()
    assert 0 < len(channels) <= layer.out_channels
    assert check_ranges(network) == 0
    _assert_verified(network, _map())
    return network


def test_moving_ranges_leave_a_widened_step_wide() -> None:
    network = nn.Sequential(_with_dead_channels(widens=True))
    widen_steps(network)
    wide = network[0]._weight_quantizer.amax.clone()
    start_observing(network)
    network(_map())
    finish_observing(network, momentum=1.0)
    assert check_ranges(network) == 0
    assert torch.equal(network[0]._weight_quantizer.amax, wide)


def test_a_bias_beyond_half_precision_is_refused_by_name() -> None:
    layer = _conv()
    with torch.no_grad():
        layer.bias[2] = 70000.0
    network = nn.Sequential(_quantized(layer, "fp16", _map()))
    with pytest.raises(
        UserError, match=r"Conv2d +bias beyond fp16; accepted: up to 65504 +1 of 5, channels 2"
    ):
        check_ranges(network)


# Schemes


def _prepared(defaults: dict[str, Any], *rules: dict[str, Any]) -> tuple[nn.Module, Any]:
    network = dense_network()
    scheme = Scheme.from_dict({"defaults": defaults, "rules": list(rules)})
    return network, prepare(network, scheme, dense_batches(1)[0])


def test_defaults_and_rules_say_which_bias_a_layer_has() -> None:
    rules = ({"layers": "0.*", "bias": "fp16"}, {"layers": "2", "weight": {"bits": 4}})
    network, prepared = _prepared({"bias": "accumulator"}, *rules)
    kinds = {name: chosen.bias for name, chosen in prepared.schemes.items()}
    assert kinds == {"0.0": "fp16", "1.0": "accumulator", "2": "accumulator"}
    assert [network[0][0].bias_kind, network[1][0].bias_kind] == ["fp16", "accumulator"]


def test_an_absent_key_is_a_float_bias() -> None:
    _, prepared = _prepared({})
    assert {chosen.bias for chosen in prepared.schemes.values()} == {"float"}
    assert Scheme.from_dict({}) == Scheme.from_dict({"defaults": {"bias": "float"}})
    assert Scheme.from_dict({}).on_small_step == "error"


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"layers": "*", "input": "off"}, "fp16"),
        ({"layers": "*", "input": {"mode": "dynamic"}}, "fp16"),
        ({"layers": "*", "weight": {"format": "fp8_e4m3"}}, "fp16"),
        ({"layers": "0.0", "weight": "off", "input": "off"}, "float"),
    ],
)
def test_only_a_layer_with_an_integer_sum_has_an_accumulator(rule: dict[str, Any], kept: str) -> None:
    _, prepared = _prepared({"bias": "accumulator"}, rule)
    assert prepared.schemes["0.0"].bias == "float"
    network, prepared = _prepared({"bias": "fp16"}, rule)
    assert prepared.schemes["0.0"].bias == kept
    if kept == "fp16":  # simulated: the float layer on rounded values
        layer, x = network[0][0], dense_batches(1)[0]
        with collecting_ranges(network):
            network(x)
        without = layer(x) - layer.bias.half().float().view(-1, 1, 1)
        layer.bias = None
        assert torch.allclose(without, layer(x), atol=1e-5)


@pytest.mark.parametrize("value", ["int32", 1, True, "off"])
def test_an_unknown_bias(value: Any) -> None:
    with pytest.raises(UserError, match=r"bias: got .*accepted: .*float.*accumulator.*fp16"):
        Scheme.from_dict({"defaults": {"bias": value}})


def test_a_scheme_is_read_back_as_it_was() -> None:
    content = {
        "on_small_step": "widen",
        "defaults": {"bias": "accumulator"},
        "rules": [{"layers": "a", "bias": "float"}, {"layers": "b", "weight": {"bits": 4}}],
    }
    scheme = Scheme.from_dict(content)
    written = scheme.to_dict()
    assert Scheme.from_dict(written) == scheme
    assert [rule.get("bias") for rule in written["rules"]] == ["float", None]
    assert "bias" not in written["rules"][1]


def test_a_rule_of_biases_does_not_say_why_a_layer_is_float() -> None:
    rules = ({"layers": "0.*", "weight": "off", "input": "off"}, {"layers": "*", "bias": "fp16"})
    _, prepared = _prepared({}, *rules)
    assert prepared.schemes["0.0"].why_float == "rule 1 (0.*)"


def test_quantizers_taken_out_leave_nothing_behind() -> None:
    network, _ = _prepared({"bias": "accumulator"})
    plain, x = dense_network(), dense_batches(1)[0]
    remove_quantizers(network)
    assert torch.equal(network(x), plain(x))
    assert vars(network[0][0]).keys() == vars(plain[0][0]).keys()


def test_calibrators_see_the_float_bias() -> None:
    """Ranges are found in float: the kind of bias does not move them."""
    found = []
    for bias in KINDS:
        network, _ = _prepared({"bias": bias})
        with collecting_ranges(network):
            for batch in dense_batches():
                network(batch)
        found.append([layer._input_quantizer.amax for layer in (network[0][0], network[1][0], network[2])])
    assert found[0] == found[1] == found[2]


def test_ranges_are_learned_though_they_were_looked_at_before() -> None:
    layer = _quantized(_conv(), "accumulator", _map())
    assert bias_problems(nn.Sequential(layer)) == []
    apply_policy(nn.Sequential(layer), "learned")
    learned = (layer._input_quantizer._log_amax, layer._weight_quantizer._log_amax)
    grads = torch.autograd.grad(layer(_map()).square().sum(), learned)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_the_same(kind: str) -> None:
    x, layer = _map(), _quantized(_conv(), kind, _map())
    expected = layer(x)
    found = layer.cuda()(x.cuda())
    assert torch.equal(found.cpu(), expected)
    (grad,) = torch.autograd.grad(found.sum(), layer.bias)
    assert torch.allclose(grad.cpu(), torch.full((5,), float(x.shape[0] * 9 * 7)))
