"""The quantized structure of CenterPoint: folding, coverage, sharing."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cpq_train.arms.structure import build
from cpq_train.common.errors import UserError
from cpq_train.models import CenterPoint, NetworkConfig
from cpq_train.quantization.batchnorm import fold_batchnorm
from cpq_train.quantization.coverage import coverage_of
from cpq_train.quantization.layers import QuantAdd, QuantConv2d, QuantSubMConv3d
from cpq_train.quantization.prepare import prepare
from cpq_train.quantization.prepared import prepared_of
from cpq_train.quantization.quantizer import Quantizer
from cpq_train.quantization.ranges.calibration import collecting_ranges
from cpq_train.quantization.scheme import Scheme
from cpq_train.quantization.switches import quantizers
from cpq_train.quantization.trace import trace

SMALL = NetworkConfig(
    point_cloud_range=(-6.4, -6.4, -5.0, 6.4, 6.4, 3.0),
    backbone_2d_channels=(32, 64),
    upsample_channels=(32, 32),
    head_channels=16,
)
INT8 = Scheme.from_file("configs/schemes/int8.yaml")


def _voxels(seed: int = 0, num: int = 600) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.stack([torch.randint(0, n, (num,), generator=generator) for n in (2, 40, 128, 128)], 1)
    coords = torch.unique(coords, dim=0).int()
    return torch.randn(len(coords), 5, generator=generator), coords, 2


def _trained_looking(network: nn.Module) -> nn.Module:
    """BatchNorm statistics and factors far from their initial values."""
    generator = torch.Generator().manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return network.eval()


def test_folding_changes_nothing_layer_by_layer() -> None:
    float_network = _trained_looking(CenterPoint(SMALL))
    folded_network = copy.deepcopy(float_network)
    folds = trace(folded_network, folded_network.example_input()).folds
    assert len(folds) == 72
    fold_batchnorm(folded_network, folds)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded_network.modules())
    outputs: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
    for which, network in enumerate((float_network, folded_network)):
        for name, module in network.named_modules():
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(
                    lambda m, i, o, n=name, w=which: outputs[w].setdefault(f"{n}{len(outputs[w])}", o.clone())
                )
    with torch.no_grad():
        heads = [network(*_voxels()) for network in (float_network, folded_network)]
    assert outputs[0].keys() == outputs[1].keys()
    tensors = [*zip(outputs[0].values(), outputs[1].values(), strict=True)]
    tensors += [(a[k], b[k]) for a, b in zip(*heads, strict=True) for k in a]
    assert len(tensors) > 50
    for reference, result in tensors:
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_full_size_coverage() -> None:
    subject = build(NetworkConfig(), "ptq", INT8)
    assert coverage_of(subject.prepared).counts == {
        "sparse": (20, 21),
        "Conv2d": (85, 85),
        "ConvTranspose2d": (2, 2),
        "ResidualAdd": (8, 8),
    }
    assert [n for n, s in subject.prepared.schemes.items() if s.is_float] == ["backbone_3d.conv_input.0"]


def test_one_tensor_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = build(SMALL, "ptq", INT8)
    head = subject.network.dense_head
    hidden = [m for n, m in head.named_modules() if n.endswith(".0.0") and n.startswith("heads_list")]
    assert len(hidden) == 36
    assert len({id(m._input_quantizer) for m in hidden}) == 1
    calls = []
    with collecting_ranges(subject.network):
        subject.network(*_voxels())
    real = Quantizer._code
    monkeypatch.setattr(Quantizer, "_code", lambda q, x: calls.append(x) or real(q, x))
    subject.network(*_voxels())
    shared = [x for x in calls if x.dim() == 4 and x.shape[1] == SMALL.head_channels]
    # The shared convolution once, and the 36 hidden outputs.
    assert len(shared) == 37


def test_residual_input_shares_the_range_of_the_block() -> None:
    for share in (True, False):
        scheme = Scheme.from_dict({**INT8.to_dict(), "share_residual": share})
        block = build(SMALL, "ptq", scheme).network.backbone_3d.conv1[0]
        assert isinstance(block.quant_add, QuantAdd)
        assert (block.quant_add._residual_quantizer is block.conv1._input_quantizer) == share


def test_a_rule_splits_a_shared_quantizer() -> None:
    content = INT8.to_dict()
    content["rules"].append({"layers": "*heads_list.0.*.0.0", "input": {"bits": 4}})
    subject = build(SMALL, "ptq", Scheme.from_dict(content))
    first = subject.network.get_submodule("dense_head.heads_list.0.hm.0.0")._input_quantizer
    second = subject.network.get_submodule("dense_head.heads_list.1.hm.0.0")._input_quantizer
    assert first is not second
    assert (first.num_bits, second.num_bits) == (4, 8)
    shares = subject.prepared.shares_input_with
    assert shares["dense_head.heads_list.0.hm.0.0"] == "dense_head.heads_list.0.center.0.0"
    assert shares["dense_head.heads_list.5.hm.0.0"] == "dense_head.heads_list.1.center.0.0"


def test_state_dict_has_every_consumers_name() -> None:
    names = set(build(SMALL, "ptq", INT8).network.state_dict())
    for name in (
        "dense_head.heads_list.0.hm.0.0._input_quantizer._amax",
        "dense_head.heads_list.5.vel.0.0._input_quantizer._amax",
        "backbone_3d.conv1.0.quant_add._input_quantizer._amax",
        "backbone_3d.conv4.2.conv2._weight_quantizer._amax",
        "backbone_2d.deblocks.1.0._weight_quantizer._amax",
    ):
        assert name in names


def test_weight_amax_has_the_channel_axis_of_its_kind() -> None:
    network = build(SMALL, "ptq", INT8).network
    deblock = network.get_submodule("backbone_2d.deblocks.1.0")
    assert deblock._weight_quantizer.amax.shape == (1, deblock.out_channels, 1, 1)
    sparse = network.get_submodule("backbone_3d.conv4.1.conv1")
    assert isinstance(sparse, QuantSubMConv3d)
    assert sparse._weight_quantizer.amax.shape == (128, 1, 1, 1, 1)


def test_uncalibrated_ranges_are_found() -> None:
    subject = build(SMALL, "ptq", INT8)
    row = r"hm.1._input_quantizer *Conv2d *nothing: it saw no tensor *0 of 0"
    with (
        pytest.raises(UserError, match=rf"38 quantizers have no usable amax(.|\n)*{row}"),
        collecting_ranges(subject.network.dense_head),
    ):
        pass  # nothing is seen


def test_codes_are_forgotten_after_a_forward() -> None:
    subject = build(SMALL, "ptq", INT8)
    with collecting_ranges(subject.network):
        subject.network(*_voxels())
        assert not prepared_of(subject.network).scope.collected
    subject.network(*_voxels())
    scope = prepared_of(subject.network).scope
    assert all(q.scope is scope for q in quantizers(subject.network).values())
    assert not scope.codes
    assert not scope.ranges


def test_nothing_to_quantize_is_an_error() -> None:
    off = Scheme.from_dict({"defaults": {"weight": {"mode": "off"}, "input": {"mode": "off"}}})
    with pytest.raises(UserError, match="nothing to quantize"):
        prepare(network := CenterPoint(SMALL), off, network.example_input())


def test_groups_name_layers_of_the_network() -> None:
    network = CenterPoint(SMALL)
    groups = trace(network, network.example_input()).one_tensor
    assert [len(g) for g in groups] == [*[2] * 8, 2, 36]
    for name in (n.removesuffix(":residual") for g in groups for n in g):
        network.get_submodule(name)


def test_quantized_layers_extend_the_float_ones() -> None:
    assert issubclass(QuantConv2d, nn.Conv2d)
