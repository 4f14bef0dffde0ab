"""The layers that train equal an integer engine bit for bit, and a layer that does not is caught."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cpq_train.common.errors import UserError
from cpq_train.quantization import reference
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.numerics import fake_quant
from cpq_train.quantization.numerics.exact_sum import Sums
from cpq_train.quantization.numerics.formats import IntegerFormat
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.switches import only_quantized, quantizers_off
from cpq_train.quantization.verification.end_to_end import Flips, verify_end_to_end
from cpq_train.quantization.verification.layers import LayerReport, verify_layers
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SparseInverseConv3d, SubMConv3d

INT8 = LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme())

formats = st.builds(IntegerFormat, st.integers(2, 16), st.booleans(), st.booleans())
schemes = st.builds(
    LayerScheme,
    *(
        st.builds(
            QuantizerScheme,
            bits=st.integers(2, 16),
            signed=st.booleans(),
            narrow_range=st.booleans(),
            granularity=st.sampled_from(granularities),
            mode=st.sampled_from(["static", "dynamic"]),
        )
        for granularities in (["per_channel", "per_tensor"], ["per_tensor"])
    ),
    bias=st.sampled_from(["float", "accumulator", "fp16"]),
)


def _reference_codes(x: torch.Tensor, amax: torch.Tensor, fmt: IntegerFormat) -> reference.codes.Coded:
    of = reference.Range(fmt.bits, fmt.signed, fmt.narrow_range, amax.numpy())
    return reference.encode(x.numpy(), of)


@settings(deadline=None, max_examples=200)
@given(formats, st.integers(0, 2**31), st.floats(2.0**-30, 2.0**20, width=32))
def test_codes_and_steps_are_equal(fmt: IntegerFormat, seed: int, amax: float) -> None:
    """Random numbers, ties between two codes and their neighbours, the edges, huge numbers."""
    random = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * amax
    ties = (torch.arange(-20, 20) + 0.5) * (amax / fmt.qmax)
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    edges = torch.tensor([0.0, -0.0, amax, -amax, 3 * amax, -3 * amax, 3e38, -3e38])
    infinite = torch.tensor([torch.inf, -torch.inf]) if amax > fake_quant.SMALLEST_AMAX else edges[:0]
    x, amax_tensor = torch.cat([random, ties, *beside, edges, infinite]), torch.tensor(amax)
    theirs = _reference_codes(x, amax_tensor, fmt)
    assert np.array_equal(theirs.codes, fake_quant.codes(x, amax_tensor, fmt).numpy())
    assert np.array_equal(theirs.step, fake_quant.step_of(amax_tensor, fmt).numpy())


@settings(deadline=None, max_examples=60)
@given(formats, st.integers(0, 2**31), st.integers(0, 3))
def test_codes_per_channel_are_equal(fmt: IntegerFormat, seed: int, axis: int) -> None:
    weight = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(seed))
    weight.select(axis, 0).zero_()  # a channel whose amax is 0
    amax = weight.abs().amax([d for d in range(4) if d != axis], keepdim=True)
    theirs = _reference_codes(weight, amax, fmt)
    assert np.array_equal(theirs.codes, fake_quant.codes(weight, amax, fmt).numpy())
    assert np.array_equal(theirs.step, fake_quant.step_of(amax, fmt).numpy())
    dynamic = reference.Range(fmt.bits, fmt.signed, fmt.narrow_range, axis=axis)
    assert np.array_equal(reference.encode(weight.numpy(), dynamic).codes, theirs.codes)


@pytest.mark.parametrize("amax", [0.0, 2.0**-24, 2.0**-25])
def test_tiny_amax_gives_codes_0_and_step_1(amax: float) -> None:
    codes, step = _reference_codes(torch.tensor([-1.0, 0.0, 3e38]), torch.tensor(amax), IntegerFormat())
    assert not codes.any()
    assert step == 1


def test_nan_has_no_code() -> None:
    with pytest.raises(UserError, match="1 of 3 numbers are NaN"):
        _reference_codes(torch.tensor([0, torch.nan, 1]), torch.tensor(1.0), IntegerFormat())


def _map(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, 7, 9)


def _voxels(channels: int) -> SparseConvTensor:
    coords = torch.unique(torch.randint(0, 9, (300, 3)), dim=0)
    coords = torch.cat([torch.randint(0, 2, (len(coords), 1)), coords], 1).int()[torch.randperm(len(coords))]
    return SparseConvTensor(torch.randn(len(coords), channels), coords, [9, 9, 9], 2)


def _strided(**settings: Any) -> SparseConvTensor:
    return SparseConv3d(3, 12, stride=2, padding=(0, 1, 1), indice_key="k", **settings)(_voxels(3))


def _subm() -> nn.Module:
    return SubMConv3d(12, 5, 3, padding=1, bias=True, indice_key="k")


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    "plain": (lambda: nn.Conv2d(12, 5, 3, padding=1), lambda: (_map(12),)),
    "strided": (lambda: nn.Conv2d(12, 5, (3, 2), stride=(2, 3), padding=(1, 0)), lambda: (_map(12),)),
    "dilated": (lambda: nn.Conv2d(12, 5, 3, dilation=2, bias=False), lambda: (_map(12),)),
    "transposed": (lambda: nn.ConvTranspose2d(12, 5, 2, stride=2, bias=False), lambda: (_map(12),)),
    "transposed, overlapping": (
        lambda: nn.ConvTranspose2d(12, 5, 3, stride=2, padding=1, output_padding=1),
        lambda: (_map(12),),
    ),
    "submanifold": (_subm, lambda: (_voxels(12),)),
    "sparse": (lambda: SparseConv3d(12, 5, 3, stride=2, padding=1), lambda: (_voxels(12),)),
    "sparse, conv4": (lambda: SparseConv3d(12, 5, 3, stride=2, padding=(0, 1, 1)), lambda: (_voxels(12),)),
    "sparse, conv_out": (
        lambda: SparseConv3d(12, 5, (3, 1, 1), stride=(2, 1, 1), bias=False),
        lambda: (_voxels(12),),
    ),
    "inverse": (lambda: SparseInverseConv3d(12, 5, 3, indice_key="k"), lambda: (_strided(kernel_size=3),)),
    "inverse, conv4": (
        lambda: SparseInverseConv3d(12, 5, (3, 2, 1), indice_key="k", bias=False),
        lambda: (_strided(kernel_size=(3, 2, 1), dilation=(2, 1, 1)),),
    ),
    "inverse, one cell": (lambda: SparseInverseConv3d(12, 5, 1, indice_key="none"), lambda: (_voxels(12),)),
    "submanifold, one cell": (lambda: SubMConv3d(12, 5, 1), lambda: (_voxels(12),)),
    "add": (ResidualAdd, lambda: (torch.randn(50, 8), torch.randn(50, 8).relu() * 3)),
}


def _quantized(kind: str, scheme: LayerScheme = INT8, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """A calibrated layer and inputs, some of them beyond its range."""
    torch.manual_seed(seed)
    layer, inputs = KINDS[kind][0](), KINDS[kind][1]()
    if kind == "add":
        scheme = LayerScheme(QuantizerScheme(mode="off"), scheme.input, has_weight=False)
    quantize_layer(layer, scheme)
    # An unsigned input may well be negative here: it saturates, on both sides.
    with collecting_ranges(layer, on_unfit=lambda problems: None):
        layer(*KINDS[kind][1]())
    return layer, inputs


@settings(deadline=None, max_examples=12)
@given(schemes, st.integers(0, 1000))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_equal(kind: str, scheme: LayerScheme, seed: int) -> None:
    layer, inputs = _quantized(kind, scheme, seed)
    (report,) = verify_layers(layer, inputs)
    assert report == LayerReport(
        "", layer.kind, "integer", num_codes=report.num_codes, num_sums=report.num_sums
    )
    assert report.num_sums >= 100


def test_sums_beyond_fp32_are_equal() -> None:
    """16-bit codes at their limit: every sum passes 2^24, and most are no fp32 number."""
    sixteen = QuantizerScheme(bits=16)
    layer, x = nn.Conv2d(12, 5, 3), torch.rand(1, 12, 7, 9) * 0.1 + 0.9
    nn.init.uniform_(layer.weight, 0.9, 1)
    quantize_layer(layer, LayerScheme(sixteen, sixteen))
    with collecting_ranges(layer):
        layer(x)
    (report,) = verify_layers(layer, (x,))
    assert report.num_mismatched == 0
    weight = reference.encode(layer.weight.detach().numpy(), reference.Range(16)).codes.astype(np.int64)
    assert weight.sum() * 0.9 * 32767 > 2**30


def test_residual_add_with_the_range_of_the_block() -> None:
    layer, inputs = _quantized("add")
    block, _ = _quantized("plain")
    layer._residual_quantizer = block._input_quantizer
    assert float(block._input_quantizer.amax) != float(layer._input_quantizer.amax)
    (report,) = verify_layers(layer, inputs)
    assert report.num_mismatched == 0


@pytest.mark.parametrize("kind", ["plain", "transposed", "submanifold", "sparse", "inverse"])
def test_a_wrong_sum_is_found_where_it_is(kind: str) -> None:
    layer, inputs = _quantized(kind)
    exact_sums = type(layer)._sums

    def wrong(layer: Any, *arguments: Any) -> Sums:
        sums = exact_sums(layer, *arguments)
        values = sums.values.detach()
        values[(1, 3, 2, 0)[: values.dim()]] += 1
        return sums._replace(values=values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "_sums", wrong)
        (report,) = verify_layers(layer, inputs)
        out = layer(*inputs)
    assert (report.mismatched_codes, report.mismatched_sums, report.mismatched_outputs) == (0, 1, 1)
    assert report.largest_difference == pytest.approx(1, rel=1e-3)
    if kind in ("plain", "transposed"):
        assert report.where == "index (1, 3, 2, 0)"
    else:
        assert report.where == f"voxel {tuple(out.indices[1].tolist())}, channel 3"


def test_a_layer_with_another_range_than_it_says_is_caught() -> None:
    layer, inputs = _quantized("plain")
    known = layer._input_quantizer.range_of(inputs[0])
    layer._input_quantizer.range_of = lambda inputs: known._replace(scale=known.scale * 1.01)
    (report,) = verify_layers(layer, inputs)
    assert report.mismatched_codes > 100
    assert report.mismatched_outputs > 100
    assert report.largest_difference > 0.5


def test_a_voxel_too_few_is_caught() -> None:
    layer, inputs = _quantized("sparse")
    exact_sums, place = type(layer)._sums, type(layer).place

    def wrong(*arguments: Any) -> SparseConvTensor:
        out = place(*arguments)
        out.indices = out.indices[1:]
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "_sums", lambda *arguments: Sums(exact_sums(*arguments).values[1:]))
        patch.setattr(type(layer), "place", wrong)
        (report,) = verify_layers(layer, inputs)
    assert report.mismatched_outputs == 5


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (LayerScheme(QuantizerScheme(), QuantizerScheme(mode="off")), "its input is not quantized"),
        (LayerScheme(QuantizerScheme(mode="off"), QuantizerScheme()), "its weight is not quantized"),
        (LayerScheme(*[QuantizerScheme(format="fp8_e4m3")] * 2), "FP8 numbers are no integers"),
        (LayerScheme(INT8.weight, INT8.input, scales_input_channels=True), "axis 0"),
    ],
)
def test_what_is_not_covered_is_said(scheme: LayerScheme, reason: str) -> None:
    layer, inputs = _quantized("transposed", scheme)
    (report,) = verify_layers(layer, inputs)
    assert report.arithmetic == "simulated"
    assert reason in report.not_covered


def _network() -> tuple[nn.Sequential, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.randn(1, 3, 20, 20)
    for index in (0, 2, 4):
        quantize_layer(network[index], INT8)
    with collecting_ranges(network):
        network(x)
    return network, (x,)


def test_switched_off_layers_are_not_covered() -> None:
    network, inputs = _network()
    with only_quantized(network, ["2"]):
        reports = verify_layers(network, inputs)
    assert [r.not_covered for r in reports] == ["its quantizers are switched off", "", reports[0].not_covered]
    with quantizers_off(network):
        assert all(r.not_covered for r in verify_layers(network, inputs))


def test_end_to_end_equal() -> None:
    network, inputs = _network()
    flips = Flips()
    ours, theirs = verify_end_to_end(network, inputs, flips)
    assert torch.equal(ours, theirs)
    assert flips == Flips(num_codes=3 * 400 + 8 * 18**2 + 8 * 16**2, num_outputs=2 * 16**2)
    assert torch.equal(network(*inputs), ours)  # the layers are their own again


def test_end_to_end_counts_flips() -> None:
    network, inputs = _network()
    known = network[0]._input_quantizer.range_of(inputs[0])
    network[0]._input_quantizer.range_of = lambda inputs: known._replace(scale=known.scale * 1.01)
    flips = Flips()
    verify_end_to_end(network, inputs, flips)
    assert list(flips.by_layer) == ["0", "2", "4"]
    assert sum(flips.by_layer.values()) == flips.num_flipped + flips.num_further
    assert flips.num_flipped > 300
    assert 0 < flips.mismatched_outputs <= flips.num_outputs
    assert flips.largest_difference > 0
