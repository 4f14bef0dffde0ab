"""The quantized layers: exact sums, gradients of pytorch-quantization's layers, and integers in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.layers import QuantAdd, QuantConv2d, quantize_layer
from cpq_train.quantization.numerics.exact_sum import EXACT_LIMIT, Codes, num_exact_parts
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.switches import quantizers_off
from cpq_train.quantization.verification.end_to_end import Flips, verify_end_to_end
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SubMConv3d, convolution

INT8 = LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme())


def _calibrate(layer: nn.Module, *inputs: Any) -> None:
    with collecting_ranges(layer):
        layer(*inputs)


def _twin(layer: nn.Module) -> nn.Module:
    """The same weights in pytorch-quantization's own module, with the same amax."""
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    cls = quant_nn.QuantConvTranspose2d if axis else quant_nn.QuantConv2d
    twin = cls(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        quant_desc_input=QuantDescriptor(amax=float(layer._input_quantizer.amax)),
        quant_desc_weight=QuantDescriptor(axis=(axis,)),
    )
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin


def _dense(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transpose":
        return nn.ConvTranspose2d(16, 24, 2, stride=2)
    return nn.Conv2d(16, 24, 3, padding=1, stride=2 if kind == "strided" else 1)


@pytest.mark.parametrize("kind", ["plain", "strided", "transpose"])
def test_dense_layers_have_the_gradients_of_pytorch_quantization(kind: str) -> None:
    layer = _dense(kind)
    calibration, x = torch.randn(2, 16, 12, 12).relu(), torch.randn(2, 16, 12, 12).relu() * 1.2
    quantize_layer(layer, INT8)
    _calibrate(layer, calibration)
    x.requires_grad_()
    results = []
    for module in (layer, _twin(layer)):
        y = module(x)
        results.append(
            (y, *torch.autograd.grad((y * torch.cos(y.detach())).sum(), (x, layer.weight, layer.bias)))
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def _integer_reference(layer: nn.Module, x: torch.Tensor) -> np.ndarray:
    """An integer 3x3 convolution with padding 1, in NumPy and int64."""
    step_x = np.float32(layer._input_quantizer.amax) / np.float32(127)
    scale_x = np.float32(127) / np.float32(layer._input_quantizer.amax)
    amax_w = layer._weight_quantizer.amax.numpy().reshape(-1, 1, 1, 1)
    codes_x = np.clip(np.rint(x.numpy() * scale_x), -128, 127).astype(np.int64)
    codes_w = np.clip(np.rint(layer.weight.detach().numpy() * (np.float32(127) / amax_w)), -128, 127)
    codes_w = codes_w.astype(np.int64)
    padded = np.pad(codes_x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    h, w = x.shape[2:]
    acc = np.zeros((x.shape[0], codes_w.shape[0], h, w), np.int64)
    for dy in range(3):
        for dx in range(3):
            acc += np.einsum("bchw,oc->bohw", padded[:, :, dy : dy + h, dx : dx + w], codes_w[:, :, dy, dx])
    scale = step_x * (amax_w / np.float32(127)).reshape(1, -1, 1, 1)
    return acc.astype(np.float32) * scale + layer.bias.detach().numpy().reshape(1, -1, 1, 1)


@pytest.mark.parametrize("extreme", [False, True])
def test_conv2d_equals_integers_bit_for_bit(extreme: bool) -> None:
    """`extreme` fills the codes so that the sum passes 2^24 and has to be split."""
    torch.manual_seed(1)
    layer = nn.Conv2d(160, 4, 3, padding=1)
    x = torch.randn(1, 160, 6, 6).relu()
    if extreme:
        with torch.no_grad():
            layer.weight.sign_().mul_(torch.rand_like(layer.weight) * 0.1 + 0.9).abs_()
        x = torch.rand(1, 160, 6, 6) * 0.2 + 0.8
    quantize_layer(layer, INT8)
    _calibrate(layer, x)
    w_codes, _ = layer._weight_quantizer.codes(layer.weight)
    bound = float(w_codes.detach().abs().sum((1, 2, 3)).max()) * 128
    assert (bound >= EXACT_LIMIT) == extreme
    with torch.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), _integer_reference(layer, x))


def test_split_sum_has_gradients() -> None:
    layer = nn.Conv2d(160, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    x = torch.ones(1, 160, 4, 4, requires_grad=True)
    quantize_layer(layer, INT8)
    _calibrate(layer, x.detach())
    w_codes, _ = layer._weight_quantizer.codes(layer.weight)
    assert num_exact_parts(Codes(x, -128, 127), Codes(w_codes, -128, 127), layer.axes) > 1
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0, 1, 1], torch.tensor(36.0))
    torch.testing.assert_close(layer.weight.grad[0, 0, 1, 1], torch.tensor(16.0))


def _sparse_input(channels: int) -> SparseConvTensor:
    torch.manual_seed(2)
    coords = torch.unique(torch.randint(0, 8, (150, 3)), dim=0)
    coords = torch.cat([torch.zeros(len(coords), 1), coords], 1).int()
    features = torch.randn(len(coords), channels).relu()
    return SparseConvTensor(features, coords, [8, 8, 8], 1)


@pytest.mark.parametrize("cls", [SubMConv3d, SparseConv3d])
@pytest.mark.parametrize("training", [True, False])
def test_sparse_layers_equal_the_layer_on_fake_quantized_values(cls: type, training: bool) -> None:
    x = _sparse_input(16)
    stride = 2 if cls is SparseConv3d else 1
    layer = cls(16, 8, 3, stride=stride, padding=1, bias=True, indice_key="k").train(training)
    weight, bias = layer.weight, layer.bias
    quantize_layer(layer, INT8)
    _calibrate(layer, _sparse_input(16))
    features = x.features.clone().requires_grad_()
    ours = layer(x.replace_feature(features)).features
    input_q, weight_q = layer._input_quantizer, layer._weight_quantizer
    plain = cls(16, 8, 3, stride=stride, padding=1, bias=True)
    values = features.detach().clone().requires_grad_()
    theirs = (
        plain.convolve(_sparse_input(16).replace_feature(input_q(values)), weight_q(weight)).features + bias
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (features, weight, bias), grad),
        torch.autograd.grad(theirs, (values, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("cls", [SubMConv3d, SparseConv3d])
def test_sparse_split_sum_is_exact(cls: type) -> None:
    """All codes 127: every sum is a known whole number, beyond 2^24 where a site has 27 neighbours."""
    x = SparseConvTensor(
        torch.ones(64, 64),
        torch.tensor([[0, z, y, x] for z in range(4) for y in range(4) for x in range(4)]).int(),
        [4, 4, 4],
        1,
    )
    layer = cls(64, 2, 3, padding=1, bias=False, indice_key="k")
    with torch.no_grad():
        layer.weight.fill_(1.0)
    quantize_layer(layer, INT8)
    _calibrate(layer, x)
    out = layer(SparseConvTensor(x.features, x.indices, [4, 4, 4], 1))
    counts = torch.tensor([2, 3, 3, 2])
    neighbours = torch.einsum("i,j,k->ijk", counts, counts, counts).float()
    expected = neighbours * 64 * 127 * 127 * (layer._input_quantizer.amax / 127) ** 2
    dense = torch.zeros(4, 4, 4)
    dense[tuple(out.indices[:, 1:].long().T)] = out.features.detach()[:, 0]
    torch.testing.assert_close(dense, expected, rtol=2e-7, atol=0)


def test_parts_of_a_split_sum_share_a_rulebook_without_an_indice_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA two rulebooks of one strided layer have their rows in different orders."""
    layer = SparseConv3d(16, 2, 3, stride=2, padding=1)
    quantize_layer(layer, LayerScheme(*[QuantizerScheme(bits=16)] * 2))
    _calibrate(layer, _sparse_input(16))
    found, convolved = [], []
    find, convolve = convolution.find_or_build, convolution.gather_multiply_scatter
    monkeypatch.setattr(convolution, "find_or_build", lambda *a: found.append(find(*a)) or found[-1])
    monkeypatch.setattr(
        convolution, "gather_multiply_scatter", lambda *a: convolved.append(a[2]) or convolve(*a)
    )
    layer(_sparse_input(16))
    assert len(found) == 1
    assert len(convolved) >= 4
    assert all(rulebook is found[0] for rulebook in convolved)


def test_sparse_layer_without_voxels() -> None:
    layer = SubMConv3d(64, 2, 3, padding=1, indice_key="k")
    nn.init.ones_(layer.weight)
    quantize_layer(layer, INT8)
    layer._input_quantizer._amax.fill_(1.0)
    empty = SparseConvTensor(torch.zeros(0, 64), torch.zeros(0, 4).int(), [4, 4, 4], 1)
    assert layer(empty).features.shape == (0, 2)


@pytest.mark.parametrize("channels", [3, 16, 20])
@pytest.mark.parametrize("num_voxels", [1, 2])
def test_few_voxels_have_gradients(num_voxels: int, channels: int) -> None:
    layer = SubMConv3d(4, channels, 3)
    quantize_layer(layer, INT8)
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])[:num_voxels].int()
    x = SparseConvTensor(torch.randn(num_voxels, 4), coords, [4, 4, 4], 1)
    _calibrate(layer, x)
    layer(x).features.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_residual_add_sums_codes() -> None:
    a, b = torch.randn(50, 8), torch.randn(50, 8).relu()
    add = ResidualAdd()
    quantize_layer(add, LayerScheme(QuantizerScheme(mode="off"), QuantizerScheme(), has_weight=False))
    assert isinstance(add, QuantAdd)
    _calibrate(add, a, b)
    q = add._input_quantizer
    torch.testing.assert_close(add(a, b), q(a) + q(b), rtol=1e-6, atol=1e-6)
    assert float(q.amax) == max(float(a.abs().max()), float(b.abs().max()))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    "shapes", [((2, 4, 1, 1), (2, 4, 3, 5)), ((2, 4, 3, 5), (4, 1, 5)), ((1, 4, 3, 1), (2, 1, 1, 5))]
)
def test_residual_add_broadcasts(shapes: tuple[tuple[int, ...], ...], mode: str) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    add = ResidualAdd()
    quantize_layer(
        add, LayerScheme(QuantizerScheme(mode="off"), QuantizerScheme(mode=mode), has_weight=False)
    )
    with torch.no_grad():
        _calibrate(add, *leaves)
    out = add(*leaves)
    rounded = [add._input_quantizer(leaf) for leaf in leaves]
    torch.testing.assert_close(out, rounded[0] + rounded[1], rtol=1e-6, atol=1e-6)
    weights = torch.randn(out.shape)
    ours = torch.autograd.grad((out * weights).sum(), leaves)
    theirs = torch.autograd.grad(((rounded[0] + rounded[1]) * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    (report,) = verify_layers(add, leaves)
    assert (report.num_mismatched, report.num_sums) == (0, out.numel())
    flips = Flips()
    verify_end_to_end(add, leaves, flips)
    assert (flips.num_flipped, flips.num_further, flips.mismatched_outputs) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "linear", "sparse", "simulated"])
def test_weights_of_another_type_are_refused(kind: str, dtype: torch.dtype) -> None:
    layer = {"linear": nn.Linear(4, 3), "sparse": SubMConv3d(4, 3, 3)}.get(kind) or nn.Conv2d(4, 3, 3)
    x = torch.randn(6, 4) if kind == "linear" else torch.randn(1, 4, 5, 5)
    if kind == "sparse":
        x = SparseConvTensor(torch.randn(2, 4), torch.tensor([[0] * 4, [0, 1, 2, 3]]).int(), [4, 4, 4], 1)
    scheme = INT8 if kind != "simulated" else LayerScheme(QuantizerScheme(mode="off"), QuantizerScheme())
    quantize_layer(layer, scheme)
    _calibrate(layer, x)
    expected = layer(x)
    layer.to(dtype)
    with pytest.raises(
        UserError, match=rf"weight of {layer.kind}\(.*4, .*3.*\) is {dtype}; accepted: torch.float32"
    ):
        layer(x)
    layer.to(torch.float32)
    assert type(layer(x)) is type(expected)


def test_weight_only_and_input_only_are_simulated() -> None:
    x = torch.randn(1, 4, 5, 5)
    off, on = QuantizerScheme(mode="off"), QuantizerScheme()
    for scheme in (LayerScheme(on, off), LayerScheme(off, on)):
        layer = nn.Conv2d(4, 4, 3)
        reference = layer(x).detach()
        quantize_layer(layer, scheme)
        assert scheme.arithmetic == "simulated"
        _calibrate(layer, x)
        assert 0 < (layer(x) - reference).abs().max() < 0.1 * reference.abs().max()


def test_off_is_the_float_layer() -> None:
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 5, 5)
    reference = layer(x)
    quantize_layer(layer, INT8)
    _calibrate(layer, x)
    assert not torch.equal(layer(x), reference)
    with quantizers_off(layer):
        assert torch.equal(layer(x), reference)


def test_dynamic_input_follows_the_tensor() -> None:
    layer = nn.Conv2d(4, 4, 3)
    quantize_layer(layer, LayerScheme(INT8.weight, QuantizerScheme(mode="dynamic")))
    assert "_input_quantizer._amax" not in layer.state_dict()
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(
        layer(x * 100) - layer.bias.view(-1, 1, 1), 100 * (layer(x) - layer.bias.view(-1, 1, 1))
    )


def test_zero_channel_quantizes_to_its_bias() -> None:
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight[2].zero_()
    quantize_layer(layer, INT8)
    x = torch.randn(1, 4, 5, 5)
    _calibrate(layer, x)
    y = layer(x)
    assert torch.equal(y[:, 2], layer.bias[2].expand_as(y[:, 2]))
    y.sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_quantize_layer_keeps_the_parameters() -> None:
    layer = nn.Conv2d(4, 4, 3)
    weight = layer.weight
    quantize_layer(layer, INT8)
    assert isinstance(layer, QuantConv2d)
    assert layer.weight is weight
    assert set(layer.state_dict()) == {"weight", "bias", "_input_quantizer._amax", "_weight_quantizer._amax"}
