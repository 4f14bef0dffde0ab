"""A spconv U-Net with inverse convolutions: quantized, trained, and verified in integers."""

import copy

import pytest
import torch
from small_unet import SmallUNet, unet_inputs
from torch import Tensor, nn

from cpq_train.quantization.layers import quantize_layer, unquantize_layer
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme, Scheme
from cpq_train.quantization.verification.end_to_end import Flips, verify_end_to_end
from cpq_train.quantization.verification.layers import verify_layers
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SparseInverseConv3d, adopt

INT8 = {"weight": {"bits": 8}, "input": {"bits": 8, "method": "mse"}, "bias": "accumulator"}


def _quantized() -> nn.Module:
    torch.manual_seed(0)
    network = SmallUNet()
    adopt(network)
    for seed in range(3):  # running statistics
        network(*unet_inputs(seed))
    network.eval()
    prepare(network, Scheme.from_dict({"defaults": INT8}), unet_inputs())
    with collecting_ranges(network):
        for seed in range(3):
            network(*unet_inputs(seed))
    return network


def test_every_layer_is_equal_to_the_integer_reference() -> None:
    network = _quantized()
    reports = verify_layers(network, unet_inputs(5))
    assert len(reports) == 9
    assert [(r.not_covered, r.num_mismatched) for r in reports] == [("", 0)] * 9
    assert {r.kind for r in reports} == {"SubMConv3d", "SparseConv3d", "SparseInverseConv3d"}


@pytest.mark.parametrize("left_in_float", ["down.0", "up.0", "unpool.0", "leave.0", ""])
def test_end_to_end_equal(left_in_float: str) -> None:
    """Whichever layer is none of the reference's, those around it find the rulebooks that they share."""
    network, flips = _quantized(), Flips()
    if left_in_float:
        unquantize_layer(network.get_submodule(left_in_float))
    ours, theirs = verify_end_to_end(network, unet_inputs(5), flips)
    assert torch.equal(ours, theirs)
    assert flips.num_flipped == flips.num_further == flips.mismatched_outputs == 0
    assert flips.num_outputs == 3 * len(unet_inputs(5)[0])


def test_it_trains_and_its_state_fits_another() -> None:
    network, inputs = _quantized().train(), unet_inputs(7)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    target = (inputs[0][:, 0] > 0).long()
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    other = _quantized()
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(other.eval()(*inputs), network.eval()(*inputs))
    assert all(r.num_mismatched == 0 for r in verify_layers(network, inputs))


def _gradients(layer: nn.Module, x: SparseConvTensor, bits: int) -> tuple[Tensor, list[Tensor]]:
    features = x.features.detach().requires_grad_()
    out = layer(x.replace_feature(features)).features
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(bits))
    return out, list(torch.autograd.grad((out * probe).sum(), [features, layer.weight, layer.bias]))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_are_those_of_fake_quantized_values(bits: int) -> None:
    torch.manual_seed(0)
    features, indices, batch_size = unet_inputs()
    x = SparseConv3d(4, 8, 3, stride=2, padding=1, indice_key="k")(
        SparseConvTensor(features, indices, [9, 12, 10], batch_size)
    )
    layer = SparseInverseConv3d(8, 6, 3, indice_key="k")
    plain = copy.deepcopy(layer)
    scheme = QuantizerScheme(bits=bits)
    quantize_layer(layer, LayerScheme(QuantizerScheme(bits=bits, granularity="per_channel"), scheme))
    with collecting_ranges(layer):
        layer(x.replace_feature(0.8 * x.features))
    y, grads = _gradients(layer, x, bits)
    input_q, weight_q = layer._input_quantizer, layer._weight_quantizer
    inside = x.features.abs() <= float(input_q.amax)
    with torch.no_grad():
        plain.weight.copy_(weight_q(layer.weight))
    expected, (of_features, *others) = _gradients(plain, x.replace_feature(input_q(x.features)), bits)
    for ours, theirs in zip((y, *grads), (expected, of_features * inside, *others), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
