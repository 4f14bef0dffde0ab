"""Ranges that are learned have LSQ's gradients, whatever the path; ranges that move follow the tensors."""

import math

import pytest
import torch
from torch import Tensor, nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics.fake_quant import codes, fake_quantize
from cpq_train.quantization.numerics.formats import Float8Format, IntegerFormat
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.ranges.policy import (
    RangePolicy,
    apply_policy,
    finish_observing,
    range_parameters,
    start_observing,
)
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.sparse import ResidualAdd, SparseConvTensor, SubMConv3d

PER_CHANNEL = LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme())


def _lsq(x: Tensor, amax: Tensor, fmt: IntegerFormat, grad: Tensor) -> Tensor:
    """Autograd of the published formula (LSQ, appendix A), in fp64."""

    def scaled(value: Tensor, factor: float) -> Tensor:
        return value.detach() + (value - value.detach()) * factor

    log = amax.double().log().requires_grad_()
    factor = 1 / math.sqrt(x.numel() / amax.numel() * fmt.qmax)
    step = scaled(log, factor).exp() / fmt.qmax
    ratio = x.double() / step
    clipped = torch.where(ratio.abs() <= fmt.qmax, ratio, ratio.detach().clamp(fmt.qmin, fmt.qmax))
    rounded = clipped + (clipped.round() - clipped).detach()
    (rounded * step * grad.double()).sum().backward()
    return log.grad


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
@pytest.mark.parametrize("function", [fake_quantize, codes])
def test_gradient_is_the_published_one(shape: tuple[int, ...], function: object) -> None:
    torch.manual_seed(0)
    x, grad, fmt = torch.randn(3, 4, 5), torch.randn(3, 4, 5), IntegerFormat(4)
    amax = torch.rand(shape) + 0.5
    log_amax = nn.Parameter(amax.log())
    function(x, amax, fmt, log_amax=log_amax).backward(grad)
    torch.testing.assert_close(log_amax.grad.double(), _lsq(x, amax, fmt, grad), rtol=1e-4, atol=1e-6)


def _layers() -> dict[str, tuple[nn.Module, tuple[object, ...]]]:
    torch.manual_seed(0)
    coords = torch.tensor([[0, z, y, x] for z in range(3) for y in range(3) for x in range(3)]).int()
    sparse = SparseConvTensor(torch.randn(27, 4), coords, [3, 3, 3], 1)
    image = torch.randn(2, 4, 6, 6)
    return {
        "sparse": (SubMConv3d(4, 6, 3, padding=1, bias=True, indice_key="k"), (sparse,)),
        "dense": (nn.Conv2d(4, 6, 3), (image,)),
        "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (image,)),
        "add": (ResidualAdd(), (torch.randn(9, 4), torch.randn(9, 4))),
    }


def _learned(layer: nn.Module, inputs: tuple[object, ...]) -> nn.Module:
    has_weight = not isinstance(layer, ResidualAdd)
    weight = QuantizerScheme(bits=4, granularity="per_channel", mode="static" if has_weight else "off")
    quantize_layer(layer, LayerScheme(weight, QuantizerScheme(bits=4), has_weight))
    with collecting_ranges(layer):
        layer(*inputs)
    apply_policy(layer, "learned")
    with torch.no_grad():
        for parameter in range_parameters(layer):
            parameter -= 0.3  # something is clipped
    return layer


@pytest.mark.parametrize("kind", _layers())
def test_integer_and_simulated_layers_agree_on_gradients(kind: str) -> None:
    """The integer path has gradients of its own writing; the simulated one leaves them to autograd."""
    layer, inputs = _layers()[kind]
    _learned(layer, inputs)
    gradients = []
    for is_integer in (True, False):
        layer.why_simulated = "" if is_integer else "to compare"
        out = layer(*inputs)
        out = out.features if isinstance(out, SparseConvTensor) else out
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(out, range_parameters(layer), torch.randn_like(out)))
    assert len(gradients[0]) == (1 if kind == "add" else 2)
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_fp8_ranges_can_be_learned() -> None:
    x, log_amax = torch.randn(50), nn.Parameter(torch.tensor(0.1))
    fake_quantize(x, log_amax.detach().exp(), Float8Format(), log_amax=log_amax).square().sum().backward()
    assert log_amax.grad.abs() > 0


def test_a_learned_range_stays_positive_and_saves_what_it_is() -> None:
    layer, inputs = _layers()["dense"]
    _learned(layer, inputs)
    ranges = range_parameters(layer)
    optimizer = torch.optim.AdamW([{"params": ranges, "lr": 0.5, "weight_decay": 0.0}])
    for _ in range(20):
        optimizer.zero_grad()
        layer(*inputs).square().sum().backward()
        optimizer.step()
    state = layer.state_dict()
    amax, log_amax = (state[f"_input_quantizer.{name}"] for name in ("_amax", "_log_amax"))
    assert 0 < amax < 1  # smaller outputs, smaller loss
    assert torch.equal(amax, log_amax.exp())
    apply_policy(layer, "frozen")
    assert not range_parameters(layer)
    assert torch.equal(layer._input_quantizer.amax, amax)


def test_ranges_move_by_the_momentum() -> None:
    layer = nn.Conv2d(4, 6, 3)
    quantize_layer(layer, PER_CHANNEL)
    with collecting_ranges(layer):
        layer(torch.full((1, 4, 5, 5), 2.0))
    with torch.no_grad():
        layer.weight.mul_(3.0)
    weight_amax = layer._weight_quantizer.amax.clone()
    start_observing(layer)
    rounded = layer(torch.full((1, 4, 5, 5), 4.0))
    finish_observing(layer, momentum=0.25)
    assert float(layer._input_quantizer.amax) == 2.5
    torch.testing.assert_close(layer._weight_quantizer.amax, weight_amax * 1.5)
    assert rounded.max() < nn.functional.conv2d(torch.full((1, 4, 5, 5), 4.0), layer.weight, layer.bias).max()


@pytest.mark.parametrize("x", [torch.zeros(0, 4, 5, 5), torch.zeros(1, 4, 5, 5)])
def test_a_step_that_shows_nothing_moves_no_range(x: Tensor) -> None:
    layer = nn.Conv2d(4, 6, 3)
    quantize_layer(layer, PER_CHANNEL)
    with collecting_ranges(layer):
        layer(torch.full((1, 4, 5, 5), 2.0))
    start_observing(layer)
    layer(x)
    finish_observing(layer, momentum=0.25)
    assert float(layer._input_quantizer.amax) == 2.0


def test_when_ranges_move() -> None:
    policy = RangePolicy("moving", every_num_steps=3, num_moving_steps=7)
    assert [step for step in range(12) if policy.moves_at(step)] == [0, 3, 6]
    assert not RangePolicy("learned").moves_at(0)
