"""Bias correction: by hand on one layer, and over layers that depend on each other."""

import copy

import pytest
import torch
from small_networks import NETWORKS, calibrated, dense_batches, run, scheme, twins_of
from torch import nn

from cpq_train.quantization.batchnorm import fold_batchnorm
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.ptq.bias_correction import correct_biases
from cpq_train.quantization.ptq.twins import Twins, ordered_tensors
from cpq_train.quantization.ranges.calibration import collecting_ranges


def _mean_error(twins: Twins) -> torch.Tensor:
    """Per channel of the network's output, over all batches."""
    errors = []
    for batch in twins.batches:
        pair = (ordered_tensors(run(n, batch))[0].detach() for n in (twins.network, twins.float_network))
        errors.append((lambda a, b: (a - b).transpose(0, 1).flatten(1))(*pair))
    return torch.cat(errors, 1).double().mean(1)


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_by_hand(bias: bool) -> None:
    """A linear layer's mean error is (quantized weight - weight) applied to the mean input."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias))
    before = layer[0].bias.detach().clone() if bias else torch.zeros(4)
    x = torch.arange(24.0).view(1, 3, 2, 4) / 8
    prepare(layer, scheme({"bits": 3}, {"mode": "off"}), x)
    twins = Twins.of(layer, [x[..., :1], x[..., 1:]], run)  # of unequal size: they count by their places
    correct_biases(twins)
    conv = layer[0]
    excess = (conv._weight_quantizer(conv.weight) - conv.weight)[:, :, 0, 0].double()
    expected = before.double() - excess @ x.double().mean((0, 2, 3))
    torch.testing.assert_close(conv.bias.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize(
    ("input_mode", "bias"),
    [("static", "float"), ("static", "accumulator"), ("static", "fp16"), ("off", "float")],
)
def test_the_mean_error_of_the_output_falls(kind: str, input_mode: str, bias: str) -> None:
    twins = calibrated(kind, scheme(input={"mode": input_mode}, bias=bias))
    before = _mean_error(twins).norm()
    correct_biases(twins)
    assert _mean_error(twins).norm() < 0.2 * before
    assert all(layer.bias is not None for layer in twins.network.modules() if hasattr(layer, "kind"))


def _layer_mean(network: nn.Module, name: str, batch: torch.Tensor) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda m, i, output: outputs.append(output))
    run(network, batch)
    handle.remove()
    return outputs[0].detach().double().mean((0, 2, 3))


def test_layers_behind_see_corrected_ones() -> None:
    """Corrected one by one from the front, by hand, the biases come out the same."""
    twins = calibrated("dense")
    by_hand, batch = copy.deepcopy(twins.network), twins.batches[0]
    correct_biases(Twins(twins.network, twins.float_network, [batch], run))
    for name in ("0.0", "1.0", "2"):
        error = _layer_mean(by_hand, name, batch) - _layer_mean(twins.float_network, name, batch)
        layer, corrected = by_hand.get_submodule(name), twins.network.get_submodule(name)
        bias = torch.zeros(3) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter((bias.double() - error).float())
        torch.testing.assert_close(corrected.bias, layer.bias, rtol=0, atol=1e-5)


def test_batchnorm_takes_the_bias_of_a_convolution_without_one() -> None:
    """The correction is the same as with BatchNorm folded, and no parameter is added."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(0.5, 2)
    network.eval()
    prepared = prepare(network, scheme(), dense_batches()[0], fold=False)
    with collecting_ranges(network):
        network(dense_batches()[0])
    names = set(network.state_dict())
    twins = Twins.of(network, dense_batches(), run)
    before = _mean_error(twins).norm()
    correct_biases(twins)
    assert _mean_error(twins).norm() < 0.1 * before
    assert set(network.state_dict()) == names
    kept = run(network, dense_batches()[0])
    fold_batchnorm(network, prepared.folds)
    torch.testing.assert_close(run(network, dense_batches()[0]), kept, rtol=0, atol=1e-5)


def test_float_weights_are_the_target_whatever_became_of_the_weights() -> None:
    """Weights that were changed after the twins were made count as part of the error."""
    twins = twins_of(NETWORKS["dense"][0](), dense_batches(), scheme())
    with torch.no_grad():
        twins.network[0][0].weight.mul_(0.5)
    before = _mean_error(twins).norm()
    correct_biases(twins)
    assert _mean_error(twins).norm() < 0.2 * before
