"""What a quantizer remembers of a range follows the range."""

import torch
from torch import nn

from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme


def _values(quantizer: Quantizer, amax: float) -> torch.Tensor:
    quantizer._amax.fill_(amax)
    return quantizer(torch.tensor([0.3, 5.0]))


def test_a_new_amax_is_noticed() -> None:
    quantizer = Quantizer(QuantizerScheme())
    assert _values(quantizer, 1.0)[1] == 1.0
    assert _values(quantizer, 4.0)[1] == 4.0
    quantizer.load_state_dict({"_amax": torch.tensor(2.0)})
    assert quantizer(torch.tensor(5.0)) == 2.0


def test_training_goes_on_after_inference_mode() -> None:
    layer = nn.Conv2d(3, 3, 3)
    quantize_layer(layer, LayerScheme(QuantizerScheme(granularity="per_channel"), QuantizerScheme()))
    x = torch.randn(1, 3, 6, 6)
    with collecting_ranges(layer):
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
