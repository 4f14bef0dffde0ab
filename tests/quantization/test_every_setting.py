"""Dense layers of every setting: integers at every bit, gradients as pytorch-quantization has them."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.verification.end_to_end import Flips, verify_end_to_end
from cpq_train.quantization.verification.layers import verify_layers

NUM_DIMS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3, "ConvTranspose2d": 2, "Linear": 0}


class Called(nn.Module):
    """A layer that is called with one tensor, by name where `output_size` is given."""

    def __init__(self, layer: nn.Module, output_size: list[int] | None) -> None:
        super().__init__()
        self.layer, self.output_size = layer, output_size

    def forward(self, x: Tensor) -> Tensor:
        if self.output_size is None:
            return self.layer(x)
        return self.layer(output_size=self.output_size, input=x)


class Case(NamedTuple):
    network: Called
    twin: nn.Module
    scheme: LayerScheme
    calibration: Tensor
    x: Tensor


def _numbers(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def _schemes(draw: st.DrawFn) -> LayerScheme:
    bits = st.sampled_from([2, 4, 8, 8, 8, 9, 12, 16])
    weight = QuantizerScheme(
        bits=draw(bits),
        narrow_range=draw(st.booleans()),
        granularity=draw(st.sampled_from(["per_channel", "per_channel", "per_tensor"])),
    )
    signed = draw(st.booleans())
    input_ = QuantizerScheme(
        bits=draw(bits),
        signed=signed,
        narrow_range=signed and draw(st.booleans()),
        mode=draw(st.sampled_from(["static", "static", "dynamic"])),
    )
    bias = draw(st.sampled_from(["float", "accumulator", "fp16"]))
    return LayerScheme(weight, input_, bias=bias)


@st.composite
def _settings(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    num_dims = NUM_DIMS[kind]

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(_numbers(least, most)) for _ in range(num_dims))

    groups = draw(st.sampled_from([1, 2, 3]))
    chosen = {
        "in_channels": groups * draw(_numbers(1, 3)),
        "out_channels": groups * draw(_numbers(1, 3)),
        "kernel_size": each(1, 4),
        "stride": each(1, 3),
        "dilation": each(1, 2),
        "groups": groups,
        "padding": each(0, 2),
    }
    if kind != "ConvTranspose2d":
        chosen["padding"] = draw(st.sampled_from([chosen["padding"], "same", "valid"]))
        chosen["stride"] = 1 if chosen["padding"] == "same" else chosen["stride"]
    return chosen


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    """A quantized layer, not calibrated, and its twin with the same parameters."""
    torch.manual_seed(draw(_numbers(0, 999)))
    scheme, bias = draw(_schemes()), draw(st.booleans())
    twin_class, asked = getattr(quant_nn, f"Quant{kind}"), {}
    if kind == "Linear":
        asked = {"in_features": draw(_numbers(1, 9)), "out_features": draw(_numbers(1, 9))}
        leading, shape = tuple(draw(st.lists(_numbers(1, 4), max_size=3))), ()
    else:
        asked = draw(_settings(kind))
        leading = (2,) if draw(st.booleans()) else ()
        # Large enough for every kernel: 4 cells, 2 apart.
        shape = tuple(draw(_numbers(7, 9)) for _ in range(NUM_DIMS[kind]))
    layer = getattr(nn, kind)(**asked, bias=bias)
    x = torch.randn(2, *leading, layer.weight.shape[1] if kind == "Linear" else layer.in_channels, *shape)
    twin = twin_class(
        **{**asked, "padding": 0} if "padding" in asked else asked,
        bias=bias,
        **_descriptors(scheme, axis=int(kind == "ConvTranspose2d")),
    )
    twin.weight, twin.bias, output_size = layer.weight, layer.bias, None
    if kind != "Linear":
        twin.padding = layer.padding
    if kind == "ConvTranspose2d" and draw(st.booleans()):
        twin.output_padding = tuple(draw(_numbers(0, stride - 1)) for stride in layer.stride)
        size = nn.functional.conv_transpose2d(
            *(x[0], layer.weight, None, layer.stride, layer.padding),
            *(twin.output_padding, layer.groups, layer.dilation),
        ).shape
        output_size = list(size if draw(st.booleans()) else size[-2:])
    x = x if scheme.input.signed else x.abs()
    return Case(Called(layer, output_size), twin, scheme, x[0], x[1] * 1.2)


def _descriptors(scheme: LayerScheme, axis: int) -> dict[str, QuantDescriptor]:
    weight, input_ = scheme.weight, scheme.input
    return {
        "quant_desc_input": QuantDescriptor(
            num_bits=input_.bits, unsigned=not input_.signed, narrow_range=input_.narrow_range
        ),
        "quant_desc_weight": QuantDescriptor(
            num_bits=weight.bits,
            narrow_range=weight.narrow_range,
            axis=(axis,) if weight.granularity == "per_channel" else None,
        ),
    }


def _quantize(case: Case, is_shared: bool) -> None:
    layer = case.network.layer
    quantize_layer(layer, case.scheme)
    layer._input_quantizer.num_readers = 2 if is_shared else 1
    with collecting_ranges(case.network):
        case.network(case.calibration)


@pytest.mark.parametrize("kind", NUM_DIMS)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_forward_equals_integers(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    _quantize(case, is_shared=data.draw(st.booleans()))
    (report,) = verify_layers(case.network, (case.x,))
    assert (report.not_covered, report.num_mismatched) == ("", 0)
    assert report.num_sums == case.network(case.x).numel()
    assert report.num_codes == case.x.numel() + case.network.layer.weight.numel()
    flips = Flips()
    ours, theirs = verify_end_to_end(case.network, (case.x,), flips)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", NUM_DIMS)
@settings(deadline=None, max_examples=30, derandomize=True)
@given(data=st.data())
def test_gradients_are_those_of_pytorch_quantization(kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    _quantize(case, is_shared=data.draw(st.booleans()))
    layer, twin = case.network.layer, case.twin
    if case.scheme.input.mode == "static":
        twin._input_quantizer.amax = layer._input_quantizer.amax
    results = []
    for module in (case.network, twin):
        x = case.x.clone().requires_grad_()
        y = module(x)
        sources = [x, layer.weight] + ([] if layer.bias is None else [layer.bias])
        gradients = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), sources)
        results.append((y, *gradients) if case.scheme.bias == "float" else gradients)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_a_single_sample_may_be_changed_in_place() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(3, 7, 7, requires_grad=True)
    quantize_layer(layer, LayerScheme(QuantizerScheme(), QuantizerScheme()))
    with collecting_ranges(layer):
        layer(x)
    nn.functional.relu_(layer(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
