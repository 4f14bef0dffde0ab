"""BatchNorm kept while a quantized network trains, and folded behind it without a change."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cpq_train.common.errors import UserError
from cpq_train.quantization.batchnorm import fold_batchnorm, freeze_batchnorm, kept_batchnorms
from cpq_train.quantization.layers import quantize_layer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.ranges.policy import apply_policy
from cpq_train.quantization.scheme import LayerScheme, QuantizerScheme
from cpq_train.quantization.trace import trace
from cpq_train.sparse import SparseConv3d, SparseConvTensor, SubMConv3d


class _Sparse(nn.Module):
    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: SparseConvTensor) -> Tensor:
        return self.bn(self.conv(x).features)


def _networks() -> dict[str, tuple[nn.Module, object]]:
    torch.manual_seed(0)
    coords = torch.tensor([[0, z, y, x] for z in range(4) for y in range(4) for x in range(4)]).int()
    sparse = SparseConvTensor(torch.randn(64, 5), coords, [4, 4, 4], 1)
    image = torch.randn(2, 5, 7, 7)
    return {
        "SubMConv3d": (_Sparse(SubMConv3d(5, 6, 3, indice_key="k"), nn.BatchNorm1d(6)), sparse),
        "SparseConv3d": (_Sparse(SparseConv3d(5, 6, 3, 2, 1, indice_key="k"), nn.BatchNorm1d(6)), sparse),
        "Conv2d": (nn.Sequential(nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6)), image),
        "ConvTranspose2d": (nn.Sequential(nn.ConvTranspose2d(5, 6, 2, 2), nn.BatchNorm2d(6)), image),
    }


def _quantized(network: nn.Module, x: object, granularity: str = "per_channel") -> nn.Module:
    bn = next(m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    nn.init.uniform_(bn.weight, -1.5, 1.5)  # negative factors too
    nn.init.uniform_(bn.bias, -1, 1)
    bn.running_mean.uniform_(-1, 1)
    bn.running_var.uniform_(0.3, 2)
    scheme = LayerScheme(
        QuantizerScheme(bits=6, narrow_range=True, granularity=granularity), QuantizerScheme()
    )
    layer = network.get_submodule("conv" if isinstance(network, _Sparse) else "0")
    quantize_layer(layer, scheme)
    with collecting_ranges(network):
        network(x)
    with torch.no_grad():
        layer.weight.mul_(1 + 0.2 * torch.randn_like(layer.weight))  # as after training: some are clipped
    return network.eval()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", _networks())
def test_fold_behind_training_changes_nothing(kind: str, learned: bool) -> None:
    network, x = _networks()[kind]
    _quantized(network, x)
    if learned:
        apply_policy(network, "learned")
    codes = [layer.codes(w)[0] for layer, w in _weights(network)]
    before = network(x).detach()
    folds = trace(network, x).folds
    assert len(kept_batchnorms(network, folds)) == 1
    fold_batchnorm(network, folds)
    assert not kept_batchnorms(network, folds)
    after = network(x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    for (quantizer, weight), old in zip(_weights(network), codes, strict=True):
        assert torch.equal(quantizer.codes(weight)[0].abs(), old.abs())


def _weights(network: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    return [(m._weight_quantizer, m.weight) for m in network.modules() if hasattr(m, "_weight_quantizer")]


def test_a_per_tensor_weight_cannot_be_folded_behind_training() -> None:
    network, x = _networks()["Conv2d"]
    _quantized(network, x, "per_tensor")
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=r"0: .* per tensor.*accepted: granularity per_channel"):
        fold_batchnorm(network, trace(network, x).folds)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


def test_a_frozen_batchnorm_does_not_train() -> None:
    network, x = _networks()["Conv2d"]
    before = copy.deepcopy(network[1].state_dict())
    network.train()
    freeze_batchnorm(network)
    network(x).sum().backward()
    assert network[1].weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in network[1].state_dict().items())
