"""Under autocast, quantization is computed in fp32: every bit is what it is without."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cpq_train.quantization.layers import QuantizedConvolution, quantize_layer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.switches import quantizers
from cpq_train.sparse import ResidualAdd, SparseConv3d, SparseConvTensor, SubMConv3d

Run = Callable[[nn.Module, Tensor], Tensor]

SCHEMES = {
    "int8": LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme()),
    "dynamic": LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme(mode="dynamic")),
    "int16": LayerScheme(QuantizerScheme(bits=16, granularity="per_channel"), QuantizerScheme(bits=16)),
    "weight_only": LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme(mode="off")),
    "fp8": LayerScheme(QuantizerScheme(format="fp8_e4m3"), QuantizerScheme(format="fp8_e4m3")),
}


def _dense(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.view(2, 6, 10, 10))


def _sparse(layer: nn.Module, x: Tensor) -> Tensor:
    cells = torch.arange(200, dtype=torch.int32)
    coords = torch.stack([cells * 0, cells // 100, cells // 10 % 10, cells % 10], 1)
    return layer(SparseConvTensor(x.view(200, 6), coords, [2, 10, 10], 1)).features


def _add(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x.detach() * 0.5)  # one gradient, which bf16 rounds once


LAYERS: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), _dense),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 2, 2), _dense),
    "SubMConv3d": (lambda: SubMConv3d(6, 4, 3, padding=1, bias=True, indice_key="a"), _sparse),
    "SparseConv3d": (lambda: SparseConv3d(6, 4, 3, stride=2, padding=1, bias=False, indice_key="b"), _sparse),
    "ResidualAdd": (ResidualAdd, _add),
}


def _step(layer: nn.Module, run: Run, x: Tensor, is_cast: bool) -> list[Tensor]:
    """Output and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
        out = run(layer, x)
    out.float().square().sum().backward()
    assert x.grad is not None
    return [out, *(p.grad.clone() for p in layer.parameters() if p.grad is not None), x.grad.bfloat16()]


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_are_bit_equal(scheme: str, kind: str, is_learned: bool) -> None:
    torch.manual_seed(0)
    new_layer, run = LAYERS[kind]
    layer = new_layer()
    if kind == "ResidualAdd" and scheme == "weight_only":
        return
    quantize_layer(layer, SCHEMES[scheme])
    x = torch.randn(1200).bfloat16()
    ranges = []
    for dtype, is_cast in ((torch.float32, False), (torch.bfloat16, True)):
        with collecting_ranges(layer), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
            run(layer, x.to(dtype))
        ranges.append({name: q._amax.clone() for name, q in quantizers(layer).items() if hasattr(q, "_amax")})
    for name, amax in ranges[0].items():
        assert torch.equal(amax, ranges[1][name]), name
    if is_learned:
        for quantizer in quantizers(layer).values():
            quantizer.learn()
    expected = _step(layer, run, x.float(), is_cast=False)
    assert expected[0].dtype == torch.float32
    for inputs in (x.float(), x):
        for a, b in zip(_step(layer, run, inputs, is_cast=True), expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_float_layers_run_in_bf16() -> None:
    layer = nn.Conv2d(6, 4, 3)
    quantize_layer(layer, SCHEMES["int8"])
    layer.is_bypassed = True
    assert isinstance(layer, QuantizedConvolution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 6, 5, 5)).dtype == torch.bfloat16
